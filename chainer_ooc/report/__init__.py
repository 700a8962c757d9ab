"""Report what out-of-core mode does: traces, plans, who refers to saved arrays, and a page for a run."""
