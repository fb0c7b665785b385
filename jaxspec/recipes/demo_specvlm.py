"""SpecVLM head of the embedded target: a gate picks how images are compressed (arXiv 2509.11815).

Published: the loss, AdamW(0.9, 0.95) without weight decay, no warm-up, convolution 3x. Ours: learning rate, steps,
batch, decay, gradient clip and tree, as in demo_eaglevlm; and what an image is compressed to. The published ratios are
made for images of 576 tokens and more, an image here has 36 for nine places that may each hold another object: pruning
and pooling 4x (published: 20x) and 9 queries (published: 2) leave nine rows of it, convolution twelve.
"""

from jaxspec.drafters.compressor import CompressorConfig
from jaxspec.training import SpecVLMRecipe

recipe = SpecVLMRecipe(
    name="demo_specvlm",
    compressor=CompressorConfig(
        mode="select",
        pruning_ratio=4,
        pooling_ratio=4,
        convolution_ratio=3,
        num_queries=9,
        gate_hidden_size=64,
        gate_temperature=1.0,
    ),
    steps=920,
    batch_size=16,
    sequence_length=192,
    length_buckets=True,
    learning_rate=1e-3,
    warmup_steps=0,
    decay="linear",
    final_learning_rate_ratio=0.02,
    weight_decay=0.0,
    adam_b2=0.95,
    clip_norm=0.0,
    clip_value=0.5,
    feature_weight=1.0,
    soft_cross_entropy_weight=0.1,
    depth=6,
    top_k=2,
    total_tokens=8,
    eval_every=184,
    acceptance_every=184,
    checkpoint_every=184,
)
