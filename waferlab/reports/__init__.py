"""Pictures, tables and pages; the only place that draws."""
