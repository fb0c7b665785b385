"""ViSpec for Qwen2.5-VL-3B-Instruct, stage 1 of arXiv 2509.15235: an EAGLE head on text. It has not been run here.

"published" marks what the paper or its code states, "ours" what they leave open. Stage 2: vispec2_qwen2_5_vl_3b.py.
"""

from jaxspec.training import EagleRecipe

recipe = EagleRecipe(
    name="vispec1_qwen2_5_vl_3b",
    target="Qwen/Qwen2.5-VL-3B-Instruct",  # published
    target_dtype="bfloat16",  # ours
    conversations="data/ShareGPT_V4.3_unfiltered_cleaned_split.json",  # published: ShareGPT; which file of it is ours
    max_records=68_000,  # published
    steps=85_000,  # published: 20 epochs; the batch is ours
    batch_size=16,  # ours
    sequence_length=2048,  # ours
    length_buckets=True,  # ours
    learning_rate=3e-6,  # published (the default of its code is 3e-5)
    warmup_steps=4_250,  # published: one epoch
    decay="linear",  # published
    final_learning_rate_ratio=0.0,  # ours
    adam_b2=0.95,  # published: AdamW(0.9, 0.95)
    weight_decay=0.0,  # ours
    clip_norm=0.0,  # published: by value instead
    clip_value=0.5,  # published
    feature_noise=0.1,  # published: uniform, amplitude 0.1 * 512 / S
    feature_weight=1.0,  # published: SmoothL1
    soft_cross_entropy_weight=0.1,  # published
    ranking_weight=0.01,  # published: 0.1 * 0.1, the list-wise term of the top 10
    depth=3,  # published
    top_k=8,  # published
    total_tokens=30,  # published
    eval_every=2_000,  # ours
    acceptance_every=4_000,  # ours: about once an epoch, the best is exported
    checkpoint_every=2_000,  # ours
)
