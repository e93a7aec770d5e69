"""GRPO with retrieval rewards, supervised fine-tuning as its baseline, and what both share."""
