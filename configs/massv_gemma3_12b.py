"""MASSV drafter of Gemma3-12B-IT from Gemma3-1B-IT (arXiv 2505.10526), phase 2. Phase 1 comes first:

    python train.py configs/massv_gemma3_12b.py --name massv_gemma3_12b_phase1 --phase 1 --init-from None \
        --conversations LLaVA-Pretrain/blip_laion_cc_sbu_558k.json --learning-rate 1e-3 --batch-size 256 --steps 2180

Published: phase 1 trains the projector on image-caption pairs (LLaVA-Pretrain), phase 2 projector and text model on
answers of the target to visual-instruction prompts; cross-entropy, chains of 5. From memory of the paper, unconfirmed:
the models, chain length, learning rates (1e-3, 2e-5), batches (256, 128), one epoch each. Ours, where the source says
nothing we know of: warm-up, decay and clipping (LLaVA's own recipe), sequence length, and steps (one epoch of 558,128
pairs, and of as many prompts as LLaVA's 665k mix has).
"""

from jaxspec.training import MassvRecipe

recipe = MassvRecipe(
    name="massv_gemma3_12b",
    phase=2,
    target="google/gemma-3-12b-it",
    lm="google/gemma-3-1b-it",
    init_from="runs/massv_gemma3_12b_phase1/export",
    answers_dir="runs/gemma3_12b_answers",
    steps=5197,
    batch_size=128,
    sequence_length=2048,
    learning_rate=2e-5,
    warmup_steps=156,
    decay="cosine",
    final_learning_rate_ratio=0.0,
    adam_b2=0.999,
    clip_norm=1.0,
    save_dtype="bfloat16",
)
