"""The embedded target: LLaVA-1.5 in small, 12 layers grown from demo_target_shallow's 4.

python train.py configs/demo_target_shallow.py && python train.py configs/demo_target.py
"""

from jaxspec.training import TargetRecipe

recipe = TargetRecipe(
    name="demo_target",
    num_layers=12,
    init_from="runs/demo_target_shallow/export",
    steps=1400,
    batch_size=8,
    sequence_length=320,
    learning_rate=8e-4,
    warmup_steps=50,
    adam_b2=0.98,
    seed=1,
)
