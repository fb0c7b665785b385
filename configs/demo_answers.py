"""The self-distilled set of the embedded target: its own answers to the questions of 3,072 training scenes."""

from jaxspec.training import AnswersRecipe

recipe = AnswersRecipe(name="demo_answers", target="runs/demo_target/export", count=3072)
