"""Paint new tissue: whole-slide images to embeddings, and embeddings to new whole-slide images.

Everything is a function on the plane, in micrometres, read on a `Grid`: a slide, a map of
embeddings, the noise, a synthetic slide all answer ``thing.read(grid) -> array``.

The modules, in the order of the data; a module imports only what stands above it
(`tests/test_architecture.py` holds the package to this list):

    errors        what a user can do wrong, as a tree
    machine       what the machine lends: a device that computes, cores, memory, and what was used
    progress      what is being done, and how much of it is done
    commit        what is written appears whole or not at all
    scratch       what a painting holds while it is painted, in memory or on disk
    grid          Grid: a rectangle of pixels on the plane, in µm
    slide         Slide, open_slide: a colour at every point
    stains        the same slide as another laboratory would have stained it
    probe         what a slide's header says, found out in another process
    tiles         the tiles of a lattice, read in windows and handed out in batches
    reading       Readers: processes that read tiles ahead, so that damage costs a tile
    tissue        Tissue, find_tissue: where there is something to look at
    outlines      tissue as polygons: the GeoJSON of QuPath, out and in
    zoo           the encoders that are known by name, as data
    hub           where weights are on this machine, and the one place where they are fetched
    backbone      the networks of encoders: how they are made, and what of their answer is the embedding
    encoder       Encoder, load_encoder: a tile becomes a vector
    golden        whether a loaded encoder is the one that its name promises
    store         EmbeddingMap, EmbeddingStore: an embedding at every point, at several pitches
    inputs        the slides that are meant by what a user names, and what each is called
    blocks        what is done of a long slide, for a run that is killed
    regions       tiles through an encoder, onto lattices; what cannot be read is named
    embed         verb: slide -> store
    ledger        what is known of a cohort, on disk: claims, rows, the table, the log
    cohort        verb: slides -> stores, many of them
    fleet         a cohort by several devices, or by the workers of a Dask cluster
    interchange   a store in the files that others read: TRIDENT, STAMP, AnnData, Parquet, GeoJSON
    foreign       embeddings that others made, as maps for a brush
    labels        Labels: a class in place of an embedding, the same everywhere
    ink           Ink, pick_ink: what a tile shows as one embedding at each pitch, and palettes of them
    canvas        Canvas, Stroke: embedding maps that are painted on, and what there is to be undone
    distances     how unlike two sets of vectors are
    field         NoiseField: noise that is a function, read by address
    scenes        Scenes: what is trained on, functions that are read where they are needed
    coordinates   TrainingPack, CoordinateSampler: points, values and conditions at random places
    operators     kernel-integral, cross-attention and self-attention operators
    splat         points to the nodes of a coarse grid, and nodes to points
    condition     what a scene shows: embeddings as functions on it, and as sets of tokens
    denoiser      Denoiser: the conditional operator, a sparse level and a grid level
    diffusion     forward process, objective, noise levels, solvers
    objective     what a training step minimises: the loss at windows and at scattered points
    optimiser     how weights follow their gradients: Muon and AdamW
    checkpoint    the state of a training, twice on disk
    baselines     System: the rivals of the paper's tables, trained and used as a brush is
    brush         Brush: a trained denoiser and all it needs
    followed      embeddings that a painting follows without their slide: a store, or h5 of others
    recipe        what a training run is made of: a TOML file, checked
    train         verb: pack -> brush
    stream        one denoising step over a canvas of any size, tile by tile
    stages        a painting as a list of stages, and the memory that it takes
    paint         all steps of all pitches: a canvas from noise to image
    repaint       a part of a painting painted anew, and blended into the old one
    cluster       the tiles of a sweep on a Dask cluster
    pyramid       Pyramid: an OME-Zarr slide being written
    pair          a painting beside its reference: how close it is, and both as one picture
    estimate      how long a painting will take here
    similarity    how like its reference a painting is, tile by tile: a map, with the worst places
    synthesize    verb: brush + reference -> pyramid
    samples       what is looked at when slides are compared: tiles at chosen places
    sides         the two sides that are compared, and which synthetic slide follows which real one
    texture       what a picture of H&E is made of, in figures that need no network
    likeness      how like two sides are
    borders       whether the lattices that a painting is made on are seen in it
    published     the figures that papers print, in the networks that they use
    control       whether a painting shows what it was asked for
    nearest       where in other slides a tile looks most like itself
    copying       whether a painting copies what its brush was trained on
    evaluate      verb: real and synthetic slides -> figures
    report        figures and pictures as a folder to be read
    info          what a slide, a store, a brush, a pyramid, a canvas or a palette is
    sample        a real slide to try everything on, fetched when asked
    headers       what a slide's header says, and what in it is suspicious
    doctor        verb: whether machine, weights and slides are fit
    view          verb: napari on a slide, or on a painting beside its reference
    cli           the words
"""

__version__ = "0.11.0"
