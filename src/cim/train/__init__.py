"""GRPO with a retrieval reward (grpo), supervised fine-tuning as its baseline (sft), and what both share (common)."""
