"""The trained model as a Hugging Face folder that transformers, peft and vLLM load."""
