"""The embedded target, third step: the 4 aligned layers learn to answer questions in sentences."""

from jaxspec.training import TargetRecipe

recipe = TargetRecipe(
    name="demo_target_shallow",
    num_layers=4,
    init_from="runs/demo_target_align/export",
    inventory_share=0.2,
    steps=600,
    batch_size=16,
    sequence_length=192,
    learning_rate=1e-3,
    vision_learning_rate_ratio=0.1,
    final_learning_rate_ratio=0.5,
    warmup_steps=30,
    adam_b2=0.98,
    seed=1,
    eval_every=150,
    save_dtype="float32",
)
