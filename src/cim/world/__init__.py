"""The small world: scenes of OpenMoji art with full ground truth, and the English that describes them.

It stands in for photographs where none can be fetched. Everything a caption can say of a scene is
known, so caption quality is measured exactly instead of estimated.
"""
