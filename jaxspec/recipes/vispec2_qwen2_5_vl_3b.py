r"""ViSpec for Qwen2.5-VL-3B-Instruct, stage 2 of arXiv 2509.15235: images and long answers. It has not been run here.

"published" marks what the paper or its code states, "ours" what they leave open. Stage 1: vispec1_qwen2_5_vl_3b.py. The
target's own answers (published: 68k prompts of LLaVA-Pretrain, up to 1,024 new tokens):

python -m jaxspec distill --data LLaVA-Pretrain/blip_laion_cc_sbu_558k.json --target Qwen/Qwen2.5-VL-3B-Instruct \
    --output runs/vispec_qwen2_5_vl_3b_answers --count 68000 --suffix vispec --max-new-tokens 1024
"""

from jaxspec.training import ViSpecRecipe

recipe = ViSpecRecipe(
    name="vispec2_qwen2_5_vl_3b",
    target="Qwen/Qwen2.5-VL-3B-Instruct",  # published
    target_dtype="bfloat16",  # ours
    init_from="runs/vispec1_qwen2_5_vl_3b/export",  # published: from the weights of stage 1
    answers_dir="runs/vispec_qwen2_5_vl_3b_answers",  # published: self-generated
    num_q=2,  # published: one token and the global feature
    steps=85_000,  # ours: 20 epochs, as published for stage 1
    batch_size=16,  # ours
    sequence_length=4096,  # ours: all that `distill` answers, prompt and answer together
    length_buckets=True,  # ours
    learning_rate=3e-6,  # ours: as published for stage 1
    warmup_steps=4_250,  # ours: one epoch, as published for stage 1
    decay="linear",  # ours: as published for stage 1
    final_learning_rate_ratio=0.0,  # ours
    adam_b2=0.95,  # ours: AdamW(0.9, 0.95), as published for stage 1
    weight_decay=0.0,  # ours
    clip_norm=0.0,  # ours: by value instead, as published for stage 1
    clip_value=0.5,  # ours: as published for stage 1
    mtp_steps=1,  # published
    probability_l1_weight=10.0,  # published
    ranking_weight=0.1,  # published, of the top 10
    depth=3,  # published
    top_k=8,  # published
    total_tokens=30,  # published
    eval_every=2_000,  # ours
    acceptance_every=4_000,  # ours: about once an epoch, the best is exported
    checkpoint_every=2_000,  # ours
)
