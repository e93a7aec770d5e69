"""The small world: scenes of OpenMoji drawings with complete ground truth, and the English that describes them.

All that a caption can say about a scene is known, so caption quality is measured exactly. The rest of the package is
unknown here: the registries in data/, evaluation/ and pipeline/ call the world.
"""
