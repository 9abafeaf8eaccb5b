"""Text in, token shards out. Knows nothing of models or DeepSpeed engines."""
