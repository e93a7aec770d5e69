"""Captions compared with the truth: facts, scene graphs, human judgements, and the correlation study."""
