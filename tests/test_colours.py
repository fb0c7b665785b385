from html.parser import HTMLParser

from jaxspec.colours import TokenColours, as_html

HOSTILE = '<script>alert("1")</script> & <img src=x onerror=alert(1)> ${1} {{2}} \x1b[31m\x00 &lt;'


class Tags(HTMLParser):
    """What a browser would make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags, self.classes = "", set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.classes.append(dict(attrs)["class"])

    def handle_data(self, data):
        self.text += data


def test_an_answer_is_text_whatever_it_spells():
    """Also where tokens cut a tag in two."""
    colours, page = TokenColours(), Tags()
    cuts = [*range(3, len(HOSTILE), 3), len(HOSTILE)]
    colours.add(cuts, [number % 2 == 0 for number in range(len(cuts))])
    for start in range(0, len(HOSTILE), 10):
        page.feed(as_html(colours.split(HOSTILE[start : start + 10])))
    page.close()
    assert page.tags == {"span"} and set(page.classes) == {"draft", "own"}
    assert page.text == HOSTILE.replace("\x1b", "␛").replace("\x00", "␀")
