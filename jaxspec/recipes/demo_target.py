"""The embedded target, last step: 12 layers grown from demo_target_shallow's 4.

python train.py configs/demo_vision.py          what stands where, taught to the vision tower
python train.py configs/demo_target_align.py    finding in the picture what a word names
python train.py configs/demo_target_shallow.py  answering in sentences
python train.py configs/demo_target.py          the depth that makes a drafter worth while
"""

from jaxspec.training import TargetRecipe

recipe = TargetRecipe(
    name="demo_target",
    num_layers=12,
    init_from="runs/demo_target_shallow/export",
    inventory_share=0.05,
    steps=560,
    batch_size=8,
    sequence_length=192,
    learning_rate=7e-4,
    vision_learning_rate_ratio=0.1,
    final_learning_rate_ratio=0.02,
    warmup_steps=20,
    adam_b2=0.98,
    seed=2,
    eval_every=100,
    checkpoint_every=60,
)
