"""The embedded target, second step: 4 layers of text model learn to find in the picture what a word names.

LLaVA's feature alignment in small: the answers are bare lists of what each place holds, so that every token but the
syntax has to be looked up. Steps: demo_vision -> demo_target_align -> demo_target_shallow -> demo_target.
"""

from jaxspec.training import TargetRecipe

recipe = TargetRecipe(
    name="demo_target_align",
    num_layers=4,
    vision_from="runs/demo_vision/export",
    inventory_share=1.0,
    steps=400,
    batch_size=16,
    sequence_length=144,
    learning_rate=1e-3,
    vision_learning_rate_ratio=0.1,
    final_learning_rate_ratio=0.5,
    warmup_steps=50,
    adam_b2=0.98,
    eval_every=100,
    checkpoint_every=100,
    save_dtype="float32",
)
