"""Reading and writing published checkpoints: safetensors folders, name tables, drafters."""
