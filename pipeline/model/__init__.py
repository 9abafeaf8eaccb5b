"""The Hugging Face base with its MoE layers, and the plan of its experts."""
