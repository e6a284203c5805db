"""The density field as data: which part of it is read (spec), how it is sampled (slab, separable) and turned into a mesh (mesh)."""
