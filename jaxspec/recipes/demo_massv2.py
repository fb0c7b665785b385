"""MASSV drafter of the embedded target, phase 2 (arXiv 2505.10526): projector and text model learn the answers that the
target gave itself. What it is worth shows beside the same text model trained as long without images:

    python train.py configs/demo_massv2.py --name demo_massv_text --phase 0 --init-from runs/demo_lm/export

Published: cross-entropy on self-distilled answers, one epoch, learning rate 2e-5, batch 128 (the numbers from memory,
unconfirmed). Ours: learning rate (a small model), steps and batch.
"""

from jaxspec.training import MassvRecipe

recipe = MassvRecipe(
    name="demo_massv2",
    phase=2,
    init_from="runs/demo_massv1/export",
    steps=600,
    batch_size=16,
    sequence_length=192,
    length_buckets=True,
    learning_rate=1e-3,
    warmup_steps=10,
    final_learning_rate_ratio=0.02,
    seed=1,
    eval_every=100,
)
