"""A small text model of the embedded target's family, which MASSV starts from (demo_massv1): it has read the target's
answers and seen no picture. As it is, `runs/demo_lm/export` is also the text-only drafter.

All values are ours: MASSV takes a published text model.
"""

from jaxspec.training import SmallLanguageModelRecipe

recipe = SmallLanguageModelRecipe(
    name="demo_lm",
    steps=800,
    batch_size=16,
    sequence_length=192,
    length_buckets=True,
    learning_rate=2e-3,
    warmup_steps=20,
    final_learning_rate_ratio=0.1,
    adam_b2=0.98,
    eval_every=100,
)
