"""The cases that every backend is held to: small and odd shapes, every option, every layout."""
