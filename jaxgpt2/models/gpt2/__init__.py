"""GPT-2 (Radford et al., 2019) in Flax, with Hugging Face's weights."""
