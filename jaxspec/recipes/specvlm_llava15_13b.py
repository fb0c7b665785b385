"""SpecVLM for LLaVA-1.5-13B with the values of arXiv 2509.11815; it has not been run here.

"published" marks what the paper states, "ours" what it leaves open.
"""

from jaxspec.drafters.compressor import CompressorConfig
from jaxspec.training import SpecVLMRecipe

recipe = SpecVLMRecipe(
    name="specvlm_llava15_13b",
    target="llava-hf/llava-1.5-13b-hf",  # published
    target_dtype="bfloat16",  # ours
    conversations="data/llava_v1_5_mix665k.json",  # published
    image_folder="data",  # where coco/, gqa/, ocr_vqa/, textvqa/ and vg/ are
    compressor=CompressorConfig(
        mode="select",  # published: the default of its three modes
        pruning_ratio=20,  # published
        pooling_ratio=20,  # published
        convolution_ratio=3,  # published
        shared_ratio=3,  # published, of mode "weighted"
        num_queries=2,  # published
        gate_hidden_size=256,  # ours
        gate_temperature=1.0,  # ours
    ),
    steps=5195,  # published: one epoch in its main tables (665K / 128), up to five in its scaling study
    batch_size=128,  # published
    sequence_length=2048,  # ours
    length_buckets=True,  # ours
    learning_rate=5e-5,  # published (8e-5 for 7B)
    warmup_steps=0,  # published
    decay="linear",  # ours
    final_learning_rate_ratio=1.0,  # ours: a constant rate, for no decay is named
    adam_b2=0.95,  # published: AdamW(0.9, 0.95)
    weight_decay=0.0,  # published
    clip_norm=0.0,  # ours: by value instead, as EAGLE-2 does
    clip_value=0.5,  # ours, EAGLE-2's
    feature_weight=1.0,  # published: SmoothL1
    soft_cross_entropy_weight=0.1,  # published
    depth=7,  # published
    top_k=10,  # published
    total_tokens=60,  # published
    eval_every=250,  # ours
    acceptance_every=500,  # ours: ten times on the way, the best is exported
    checkpoint_every=250,  # ours
)
