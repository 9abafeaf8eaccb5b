"""The Hugging Face model with its MoE layers, and the plan of its experts."""
