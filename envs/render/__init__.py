"""Pictures of the environments, imported only when asked for: they need Pillow (`jaxrl[train]`)."""
