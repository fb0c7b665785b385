"""Serve a vision-language model with speculative decoding to any OpenAI client:

    python serve.py                                  # the embedded model
    python serve.py --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 \
        --speculative-config '{"method": "vispec", "model": "JLKang/ViSpec-llava-1.5-7b-hf"}'

It says when it is ready; then, from another terminal:

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
      "model": "demo", "stream": true,
      "messages": [{"role": "user", "content": "What is a chart for?"}]}'

A picture is one more part of the content: {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}.
`python serve.py --help` says all that can be set, docs/SERVING.md the rest. `jaxspec serve` is the same without a
checkout.
"""

import sys

from jaxspec import cli


def main() -> None:
    sys.exit(cli.main(["serve", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
