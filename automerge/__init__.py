"""automerge."""
