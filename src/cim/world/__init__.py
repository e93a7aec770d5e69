"""The small world: scenes of OpenMoji drawings with complete ground truth, and the English that describes them.

It stands in for photographs where none can be downloaded. Everything that a caption can say about a scene is known, so
caption quality is measured exactly instead of estimated. It knows nothing of the rest of the package: the registries in
data/, evaluation/ and pipeline/ call it.
"""
