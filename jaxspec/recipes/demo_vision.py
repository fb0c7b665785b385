"""The embedded target's vision tower: 4 CLIP layers learn what stands where in a scene."""

from jaxspec.training import VisionRecipe

recipe = VisionRecipe(name="demo_vision", steps=1500, batch_size=32, learning_rate=7e-4, adam_b2=0.98, eval_every=250)
