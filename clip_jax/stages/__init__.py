"""The stages in their order, and the folder in which each leaves its files: the only list of them."""

STAGES = {
    'ingest': 'ingest',
    'embedder': 'embedder',
    'embed': 'embeddings',
    'dedup': 'dedup',
    'search': 'search',
    'prune': 'splits',
    'train': 'train',
    'evaluate': 'evaluate',
    'report': 'report',
}
