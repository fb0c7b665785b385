r"""MASSV drafter of Gemma3-12B-IT from Gemma3-1B-IT (arXiv 2505.10526), phase 2. Not run here.

"published" marks what the paper states, "unconfirmed" what we believe that it states, "ours" what it leaves open as far
as we know. Phase 1 comes first. Published: only the projector learns, from the image-caption pairs of LLaVA-Pretrain;
unconfirmed: learning rate, batch, one epoch (of 558,128 pairs); ours: everything else, warm-up being 3 % of the steps:

    python train.py configs/massv_gemma3_12b.py --name massv_gemma3_12b_phase1 --phase 1 --init-from None \
        --conversations LLaVA-Pretrain/blip_laion_cc_sbu_558k.json --learning-rate 1e-3 --batch-size 256 --steps 2180 \
        --warmup-steps 65

Then the target answers visual-instruction prompts itself (published). Ours: the prompts are the first questions of
LLaVA's 665k mix, answered greedily, in as many tokens together with the prompt as training reads:

    python -m jaxspec distill --data data/llava_v1_5_mix665k.json --image-folder data \
        --target google/gemma-3-12b-it --output runs/massv_gemma3_12b_answers \
        --max-new-tokens 1024 --max-length 2048
"""

from jaxspec.training import MassvRecipe

recipe = MassvRecipe(
    name="massv_gemma3_12b",
    phase=2,  # published: projector and text model learn
    target="google/gemma-3-12b-it",  # unconfirmed
    target_dtype="bfloat16",  # ours
    lm="google/gemma-3-1b-it",  # unconfirmed
    init_from="runs/massv_gemma3_12b_phase1/export",  # published
    answers_dir="runs/massv_gemma3_12b_answers",  # published: self-generated
    steps=5197,  # unconfirmed: one epoch; ours: of 665k prompts
    batch_size=128,  # unconfirmed
    sequence_length=2048,  # ours
    learning_rate=2e-5,  # unconfirmed
    warmup_steps=156,  # ours: 3 % of the steps, as LLaVA
    decay="cosine",  # ours: as LLaVA
    final_learning_rate_ratio=0.0,  # ours
    adam_b2=0.999,  # ours: as LLaVA
    weight_decay=0.0,  # ours: as LLaVA
    clip_norm=1.0,  # ours: as LLaVA
    depth=4,  # unconfirmed: five tokens
    top_k=1,  # published: in a chain
    total_tokens=6,  # unconfirmed: five tokens, and the root
    eval_every=250,  # ours
    acceptance_every=500,  # ours: ten times on the way, the best is exported
    checkpoint_every=250,  # ours
    save_dtype="bfloat16",  # ours: as the text model is published
)
