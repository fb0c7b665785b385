"""What a target offers beside its passes."""

import numpy as np
import pytest

from tests.families import FAMILIES, family_target


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_table(family):
    target = family_target(family)
    model, text = target.model, target.config.text
    assert model.embedding.shape == (model.vocab_size, text.hidden_size) == (len(target.tokenizer), text.hidden_size)
    assert model.embedding.dtype == model.dtype
    ids = np.arange(model.vocab_size)[None]
    np.testing.assert_allclose(model.embed(ids)[0], model.embedding * text.embedding_scale, rtol=1e-6)
