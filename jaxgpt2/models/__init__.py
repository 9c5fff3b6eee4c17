"""Float models that read tokens and give logits."""
