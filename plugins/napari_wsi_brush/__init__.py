"""The napari plugin of wsi-brush: slides, paintings and stores in µm, and two of them side by side."""
