"""The embedded target, first half of its training: 4 layers learn to see and to speak (see demo_target.py)."""

from jaxspec.training import TargetRecipe

recipe = TargetRecipe(
    name="demo_target_shallow",
    num_layers=4,
    steps=1400,
    batch_size=8,
    sequence_length=320,
    learning_rate=1.5e-3,
    final_learning_rate_ratio=0.3,  # demo_target.py goes on from here
    warmup_steps=100,
    adam_b2=0.98,
    save_dtype="float32",
)
