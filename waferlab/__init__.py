"""What the pipeline is made of: one folder a concern. The story that uses it is `integrated_pipeline.py`."""
