"""What processes exchange: file formats and the layout of shared memory."""
