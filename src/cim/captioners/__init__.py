"""Any image-text-to-text model of transformers: loading it, and captioning with it."""
