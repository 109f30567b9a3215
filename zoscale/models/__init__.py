"""Hugging Face causal language models: built sharded, asked for answers, written answers."""
