"""The napari plugin of wsi-brush: synthetic and real OME-Zarr slides as one RGB layer in µm."""
