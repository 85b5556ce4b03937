"""Small files that change a model, in and out: LoRA, learned words, Custom Diffusion. Each dialect of LoRA is a file, listed in lora.py."""
