"""The meanings of the files of a work directory, for make_files_table.py.

MEANINGS: file -> array, column or key ('' for the whole file) -> meaning. ANY_FILE: start of a
file's path -> the same, for contents that mean the same in every such file.
"""

_ESTIMATE = {
  'low': 'lower end of its 95 % interval',
  'high': 'upper end of its 95 % interval',
  'method': (
    'of the interval: `crossed` (three or more seeds: over seeds and images), `range` (two seeds: '
    'the lower and the higher value), `bootstrap`, `none`, or over images only, for one seed: '
    '`wilson`, `cluster-robust` (images share groups), `this checkpoint` (differences)'
  ),
  'seeds': 'seeds behind the interval',
  'images': 'images behind the interval',
  'groups': 'independent units among them: `images` if no image has a group',
  'df': "degrees of freedom of the interval, empty for Wilson's or without an interval",
}
_ACCURACY = {
  'rule': 'rule of the split',
  'without_leaked': 'True: without queries that have a near-duplicate in the anchor',
  'accuracy': 'zero-shot accuracy, mean over seeds; of retrieval: image-to-text recall@1',
  'seeds': 'number of seeds',
  'images': 'number of images',
  'pool_rows': 'pool rows of the split',
  'anchor_rows': 'anchor rows of the split',
  'anchor_share': "the anchor's share of the split's rows, and so of the samples seen",
  'samples': 'samples seen in a run',
  'passes': 'passes over the split',
  'mark': '`not converged` if in a run learning took off late or the loss still fell at the end',
}
_PAIRS = {
  'query_key': 'key of the query',
  'query_file': 'its source file',
  'query_row': 'its row in the benchmark',
  'pool_key': 'key of the pool image',
  'pool_file': 'its source file',
  'pool_row': 'its row in the pool',
  'similarity': 'cosine of the stored vectors, divided by both norms',
  'rank': 'position of the pool row among those listed for the query, from 1, most similar first',
  'caption': 'caption of the pool image',
  'kind': '`exact` or `near`',
  'evidence': (
    'of an exact pair: equal `bytes` of the image files, equal `pixels`, or, where images do not '
    'open, equal stored `vectors`'
  ),
}
_LEAKS = {
  'pairs': 'pairs of a query and a pool row',
  'queries': 'queries in such a pair',
  'pool_rows': 'pool rows in such a pair',
}
_RATE = {
  **_LEAKS,
  'rate': '`queries` as a share of the usable queries',
  'low': 'lower end of its 95 % Wilson interval',
  'high': 'upper end of its 95 % Wilson interval',
}
_KEPT = {
  'dataset': 'dataset of the sample',
  'key': 'its key, or the column `prune.export_key`',
  'row': 'its row in the dataset',
  'file': 'its source file',
  'offset': 'first byte of the image',
  'length': 'bytes of the image',
}
_REMOVED = {
  'key': 'key of a pool row that is not in the split, or the column `prune.export_key`',
  'row': 'the row',
  'file': 'its source file',
  'reason': 'why: `rule`, `duplicate` (de-duplication), `in the anchor`, or `unusable`',
}
_WORDS = {
  'word': 'word',
  'removed_share': 'share of the removed captions with the word',
  'kept_share': 'share of the kept captions with the word',
  'z': 'z-score of the log-odds; rows are sorted by it',
}
_REMOVED_BY = {
  'count': 'candidates that the split removes',
  'total': 'candidates',
}
_PAPER = {
  'top_k': 'rows that the published code keeps for each query and chunk (`search.paper_top_k`)',
  'chunk_rows': 'rows of a chunk',
  'over': 'rows over the threshold of some query, which exact pruning removes',
  'missed': 'those of them outside the top k of every such query',
}
_AGREEMENT = {
  'embedder': 'the further embedder',
  'removed_here': 'rows that the split removes, by the main embedder',
  'removed_there': 'rows that the same rule removes by the further embedder',
  'jaccard': 'rows that both remove, as a share of the rows that either removes',
  'same_count_jaccard': 'the same if the further embedder removes `removed_here` rows',
  'spearman': 'rank correlation of all candidates, null if one order is constant',
  'only_here': 'rows that only the main embedder removes',
  'only_there': 'rows that only the further embedder removes',
}
_CLUSTERING = {
  'clusters': 'number of clusters',
  'found': 'pairs with both rows in one cluster',
  'recall': 'share of all pairs that is found, null without pairs',
  'low': 'lower end of its 95 % interval',
  'high': 'upper end of its 95 % interval',
  'dropped': 'sampled rows with an earlier duplicate in their cluster',
  'precision': 'share of them that exhaustive search drops, too',
}
_COPIES = {
  'kind': 'kind of copy, `all` for all together',
  'copies': 'number of copies',
  'found': 'copies whose similarity to their query is at or above the duplicate similarity',
  'recall': 'share of the copies that is found',
  'low': 'lower end of its 95 % Wilson interval',
  'high': 'upper end of its 95 % Wilson interval',
  'least': 'lowest similarity of a copy to its query',
  'median': 'median of these similarities',
  'similarity_wanted': 'similarity that the wanted share of the copies reaches',
  'threshold_wanted': '1 - `similarity_wanted`, as `dedup.threshold` takes it',
  'others_over_wanted': 'share of the nearest other images at or above `similarity_wanted`',
  'others_over_wanted_low': 'lower end of its 95 % Wilson interval',
  'others_over_wanted_high': 'upper end of its 95 % Wilson interval',
}


def _under(start: str, meanings: dict[str, str]) -> dict[str, str]:
  return {start + key: meaning for key, meaning in meanings.items()}


def _levels(start: str) -> dict[str, str]:
  return {
    f'{start}.candidates': 'candidates of this value',
    f'{start}.dropped': 'those that the split removes',
    f'{start}.share': 'their share',
  }


MEANINGS = {
  # ----------------------------------------------------------------------------------------------
  # top, and in every folder
  'config.json': {'': 'the config of the last command; `clip_jax/defaults.py` explains its keys'},
  'log.txt': {
    '': 'log of all commands; `--verbose` shows the same in the terminal. Further processes '
    'that work together: `log-I.txt`; commands that share the work: `log-HOST-PID.txt`'
  },
  'times.json': {
    'seconds.<stage>': 'seconds that the stage took, over all commands',
    'command': 'the last command',
  },
  'versions.json': {
    'python': 'version of Python',
    'packages.<package>': 'version of the package, null if it is not installed',
    'devices': 'devices of JAX, and their number',
    'cpus': 'CPUs that the command may use',
    'machine': 'kind of processor',
    'huge_pages': 'value of GLIBC_TUNABLES',
  },
  '<product>.sidecar.json': {
    'name': 'name of the product: its path without ending',
    'fingerprint': 'sha256 of `keys`, `inputs` and `version`; it decides whether the product fits',
    'version': 'version of the file format',
    'keys': 'config keys that change the content, with their values',
    'at_least': 'config keys for which a larger stored value fits, too',
    'inputs': 'fingerprints of the products that it reads, and stamps of its source files',
    'files': 'bytes of each file, -1 for a folder',
    'checksum': 'sha256 of the names and contents of the files',
    'counts': 'numbers for the log and the report; see the last table',
  },
  '<stage>/manifest.json': {
    'products[].name': 'name of a finished product of the stage',
    'products[].fingerprint': 'fingerprint in its sidecar',
    'products[].checksum': 'checksum in its sidecar',
    'products[].counts': 'counts in its sidecar',
  },
  # ----------------------------------------------------------------------------------------------
  # ingest
  'ingest/<dataset>/broken.csv': {
    'shard': 'number of the source shard',
    'file': 'name of the source file',
    'key': 'key of the skipped sample',
    'reason': 'why it cannot be used',
  },
  'ingest/<dataset>/captions.bin': {'': 'all captions in UTF-8, one after the other'},
  'ingest/<dataset>/files.json': {
    'shards[].format': 'format of the shard',
    'shards[].root': 'folder of the image files, empty if the images are inside a file',
    'shards[].path': 'path of the source file on this machine, from this folder if it is '
    'generated; empty if the images are files',
    'shards[].image_key': 'where the image is: `image_key` of the config',
    'classes': 'class names in label order',
  },
  'ingest/<dataset>/index-<i>.parquet': {
    'key': 'key of the sample',
    'caption': 'caption',
    'label': 'number of the class, -1 for none',
    'group': 'related samples (one photo, one writer) share it',
    'shard': 'number of the source shard',
    'offset': 'first byte of the image in the shard',
    'length': 'bytes of the image',
    'width': 'width in pixels, 0 if unknown',
    'height': 'height in pixels, 0 if unknown',
    'type': 'image format',
    '<column>': 'a column that the config names in `columns`',
    'query': 'planted copies only: row of the copied image in its benchmark',
    'kind': 'planted copies only: kind of copy',
    'copy': 'planted copies only: number of the copy of this image',
  },
  'ingest/<dataset>/skipped-<i>.json': {
    '[].key': 'key of a skipped sample of the shard',
    '[].reason': 'why it cannot be used',
  },
  'ingest/<dataset>/starts.npy': {'': 'first row of each shard, and the number of rows'},
  'ingest/<dataset>/summary.json': {
    'samples': 'number of rows',
    'images.bytes': 'bytes of all images',
    'images.types.<type>': 'images of this format',
    'images.width.<quantile>': 'quantiles of the width, `min`, `1%`, ... `max`',
    'images.height.<quantile>': 'quantiles of the height',
    'images.short_side.<quantile>': 'quantiles of the shorter side',
    'images.unknown_size': 'images whose size their header does not tell',
    'captions.characters.<quantile>': 'quantiles of the number of characters',
    'captions.words.<quantile>': 'quantiles of the number of words',
    'captions.empty': 'samples with an empty caption',
    'captions.repeated': 'samples whose caption is that of an earlier sample',
    'captions.repeated_share': 'their share',
    'labels.classes': 'number of classes',
    'labels.without_samples': 'classes without a sample',
    'labels.samples.<quantile>': 'quantiles of the samples of a class',
    'labels.unlabelled': 'samples without a label',
    'labels.per_class': '[class name, number of samples] of each class',
    'repeated_keys.samples': 'samples whose key is that of an earlier sample',
    'repeated_keys.first': 'up to ten such keys, with their files',
    'columns.<column>': 'samples without a value of the column',
    'shards': 'number of shards',
    'left_out': 'samples that `where` or `part` leave out',
    'skipped': 'samples that cannot be used',
    'reasons.<reason>': 'samples skipped for this reason',
    'shards_with_skipped.count': 'shards with skipped samples',
    'shards_with_skipped.worst[].file': 'a shard with many skipped samples',
    'shards_with_skipped.worst[].skipped': 'their number',
  },
  'ingest/<dataset>/table.npy': {
    'shard': 'number of the source shard',
    'offset': 'first byte of the image in the shard',
    'length': 'bytes of the image',
    'caption_offset': 'first byte of the caption in captions.bin',
    'caption_length': 'bytes of the caption',
    'label': 'number of the class, -1 for none',
  },
  'ingest/glyphs/<set>-<i>.tar': {'': 'the drawn images of the demo, one webdataset tar a set'},
  'ingest/planted/tars/<i>.tar': {'': 'the planted copies as a webdataset tar (`config.planted`)'},
  # ----------------------------------------------------------------------------------------------
  # embedder, embeddings, dedup
  'embedder/embedder.json': {
    'source': 'kind of embedder: `embedder.source`',
    'fitted_on': 'readable images on which it was fitted',
    'of_base_rows': 'rows of pool and anchor from which they were drawn',
    'seed': 'seed of the draw, or of the training',
    'image_size': 'pixels a side',
    'sha256': 'sha256 of the weights',
  },
  'embedder/embedder.npz': {
    'mean': 'mean of the images or features, subtracted before the projection',
    'components': 'principal components',
  },
  'embeddings/<dataset>/<i>.npy': {'': 'vectors, normalised in float32 before the cast'},
  'embeddings/<dataset>/usable-<i>.npy': {'': 'whether each row has a usable vector'},
  'dedup/audit.json': {
    'rows': 'rows in the random sample (`dedup.audit_rows`)',
    'usable': 'usable pool rows, with which they are compared',
    'threshold': '`dedup.threshold`',
    'clusters': 'number of clusters of the de-duplication',
    'pairs': 'near-duplicate pairs of a sampled row and any row, by exhaustive search',
    'dropped_exhaustive': 'sampled rows with an earlier duplicate anywhere',
    **_under('by_clusters[].', _CLUSTERING),
    'chains.components': 'groups of rows that the pairs join, directly or through other rows',
    'chains.largest': 'rows in the largest group',
    'chains.through_dropped': 'dropped sampled rows that are duplicates of dropped rows only',
    'chains.sizes.<rows>': 'groups with so many rows',
  },
  'dedup/centers.npy': {'': 'centers of the k-means clusters'},
  'dedup/duplicate_of.npy': {'': 'row of which each pool row is a duplicate, -1 where it is kept'},
  'dedup/keep.npy': {'': 'whether each pool row is kept'},
  'dedup/priority.npy': {
    '': 'of duplicates, the row with the highest is kept; only if `dedup.survivor` is not `first`'
  },
  # ----------------------------------------------------------------------------------------------
  # search
  'search/<benchmark>/anchor-k<K>.npz': {
    'similarity': 'similarities of the K nearest anchor rows, highest first (rule k_aligned)',
    'row': 'those anchor rows',
  },
  'search/<benchmark>/pairs-k<K>-<i>.npz': {
    'query': 'queries with a pool row that is nearer than their K-th anchor row, one entry a pair',
    'row': 'that pool row',
    'similarity': 'similarity of the pair',
  },
  'search/<benchmark>/paper.json': _PAPER,
  'search/<benchmark>/pool-<i>.npz': {
    'similarity': 'similarity of each pool row to its nearest query',
    'nearest': 'row of that query in the benchmark',
    'excess': "largest similarity to a query minus the query's anchor similarity",
    'top_similarity': 'similarities of the nearest pool rows of each query in this shard',
    'top_row': 'those pool rows',
  },
  'search/<benchmark>@<lo>_<hi>/pool-<i>.npz': {
    'similarity': (
      'as in `search/<benchmark>/`, against the queries with a hash in [lo, hi) alone: for splits '
      'with the key `queries`'
    ),
    'nearest': 'row of the nearest of these queries in the benchmark',
    'excess': 'excess over these queries',
  },
  'search/<benchmark>/queries.npz': {
    'pool_similarity': 'similarities of the nearest rows of the whole pool, highest first',
    'pool_nearest': 'those pool rows',
    'anchor_similarity': 'similarity of the nearest anchor row',
    'anchor_nearest': 'that anchor row',
    'anchor_similarity_f64': 'the exact similarity of the nearest anchor row: the threshold',
    'key': 'keys of the queries',
  },
  'search/anchor_classes/pool-<i>.npz': {
    'similarity': 'similarity of each pool row to the nearest mean vector of a class of the anchor',
    'nearest': 'number of that class',
    'excess': 'NaN: classes have no threshold',
  },
  'search/planted/calibration.json': {
    'embedder': 'kind of embedder',
    'similarity': 'similarity from which a pair counts as a duplicate',
    'threshold': '1 - `similarity`',
    'wanted': 'share of the copies that a calibrated threshold finds',
    'queries': 'queries with copies',
    'others_over': 'share of the nearest other images at or above `similarity`',
    'others_median': 'median similarity of these queries to the nearest image that is no copy',
    'others_highest': 'highest such similarity',
    **_under('kinds[].', _COPIES),
  },
  'search/sizes.npz': {
    'benchmarks': 'names of the benchmarks',
    'rows': 'number of pool rows',
    'edges': 'thresholds',
    'similarity_over': 'candidates whose similarity is over each threshold; the last row is all',
    'excess_over': 'candidates whose excess is over each threshold; the last row is all',
    'excess_zero': 'candidates with an excess over 0, which gap-aligned pruning removes; exact',
    'has_excess': 'False without an anchor',
    'candidates': 'number of candidates',
  },
  'search/<benchmark>/duplicates.parquet': _PAIRS,
  'counts of search/<benchmark>/duplicates': {
    'similarity': 'similarity from which a pair is listed',
    **{
      f'{kind}.{key}': f'{kind} duplicates: {text}'
      for kind in ('near', 'exact')
      for key, text in _LEAKS.items()
    },
    'evidence': 'exact pairs by evidence',
  },
  # ----------------------------------------------------------------------------------------------
  # splits
  'splits/<split>/export/removed_keys.parquet': _REMOVED,
  'splits/<split>/export/removed_keys.csv': _REMOVED,
  'splits/<split>/export/removed_keys.txt': {'': 'the keys of `removed_keys.parquet`, one a line'},
  'splits/<split>/export/removed_keys.npy': {'': 'the keys of `removed_keys.parquet`'},
  'splits/<split>/export/array_record/<i>.array_record': {'': "copies of the split's pool samples"},
  'splits/<split>/export/array_record/anchor-<i>.array_record': {
    '': 'copies of its anchor samples'
  },
  'splits/<split>/export/clip_ood.npy': {'': 'keys of the pool rows as numbers, sorted'},
  'splits/<split>/export/keys.parquet': _KEPT,
  'splits/<split>/export/keys.csv': _KEPT,
  'splits/<split>/export/keys.txt': {'': "the keys of the split's pool rows, one a line"},
  'splits/<split>/export/keys.npy': {'': "the keys of the split's pool rows"},
  'splits/<split>/export/uids.npy': {
    '': 'uids of the pool rows as two halves, sorted: the format of DataComp'
  },
  'splits/<split>/export/webdataset/<i>.tar': {'': "byte-exact copies of the split's pool samples"},
  'splits/<split>/export/webdataset/anchor-<i>.tar': {
    '': 'byte-exact copies of its anchor samples'
  },
  'splits/<split>/preview.json': {
    'kind': 'says that this is no CLIP training',
    'embedder': 'the further embedder whose vectors are the features (`prune.preview`)',
    'features': 'numbers in a vector',
    'rows': 'rows of the split',
    'labelled': 'rows with a class, on which the regression trains',
    'classes_by.<dataset>': 'whether classes are from `labels` or `captions`',
    'l2': 'weight of the L2 penalty',
    'benchmarks.<benchmark>.images': 'images of the benchmark',
    'benchmarks.<benchmark>.n': 'images whose class has training rows; accuracy is over these',
    'benchmarks.<benchmark>.classes': 'classes that may be predicted',
    'benchmarks.<benchmark>.of_classes': 'classes of the benchmark',
    'benchmarks.<benchmark>.top1': 'accuracy',
    'benchmarks.<benchmark>.low': 'lower end of its 95 % interval over images',
    'benchmarks.<benchmark>.high': 'upper end of its 95 % interval over images',
    'benchmarks.<benchmark>.groups': 'independent units among these images',
    'benchmarks.<benchmark>.df': "degrees of freedom of the interval, null for Wilson's",
  },
  'splits/<split>/queries-<benchmark>.npz': {
    'removed_over': 'removed rows over the threshold of each query, -1 for an unusable query',
    'removed_near': 'removed rows over or near the threshold of each query',
    'anchor_cosine': 'cosine of the query and its nearest anchor row, by the main embedder',
  },
  'splits/<split>/held-back-<benchmark>.npz': {
    'aligned': 'whether each query counts for the split; the others are held back (key `queries`)',
    'candidate_similarity': 'held-back queries: similarity of the nearest candidate; others: NaN',
    'kept_similarity': 'held-back queries: similarity of the nearest pool row that the split keeps',
  },
  'splits/<split>/rows-seed<k>.npy': {
    '': 'rows on which the run with this seed trains (rules with random draws)'
  },
  'splits/<split>/rows.npy': {'': 'rows on which the split trains (other rules)'},
  'splits/domains.npz': {
    'centers': 'centres of the k-means clusters that stand in for domains',
    'cluster': 'nearest centre of each pool row, -1 for a row that is no candidate',
  },
  'splits/<split>/split.json': {
    'rule': 'rule of the split',
    'embedder': (
      'name in `embedders` of the embedder whose similarities the split reads, empty for the main '
      'embedder'
    ),
    'parameters': 'keys of the rule with their values',
    'candidates': 'pool rows that may be in a split: usable, no duplicates, no anchor rows',
    'pool_size': 'rows of the pool',
    'pool_rows': 'pool rows of the split (first draw)',
    'anchor_rows': 'anchor rows of the split',
    'planted_rows': 'planted copies in the split',
    'dropped': 'candidates that the split does not hold',
    'append_anchor': 'whether the anchor rows are added',
    'seed': '`seed` of the split',
    'hash': 'sha256 of the rows (first draw)',
    'checks.<benchmark>.checked': 'queries whose similarity gap was checked by brute force',
    'checks.<benchmark>.failures': 'queries that failed; the stage stops unless it is 0',
    'checks.<benchmark>.kind': (
      'what must hold: `equality` with the similarity of the anchor, `inequality` (at most slack '
      'more), `each of k`'
    ),
    'checks.<benchmark>.first_failures': 'up to five failures: query and both similarities',
    'draws.<rows>.pool_rows': 'pool rows of this rows file',
    'draws.<rows>.anchor_rows': 'anchor rows of it',
    'draws.<rows>.planted_rows': 'planted copies in it',
    'draws.<rows>.hash': 'sha256 of its rows as little-endian int64',
    'draws.<rows>.decided_exactly': 'rows near the cut, decided in float64',
    'draws.<rows>.slack': 'aligned: slack that the rule ended up with, null if no row is kept',
    'draws.<rows>.aligned_dropped': 'aligned: rows that slack 0 removes',
    'draws.<rows>.pairs': 'k_aligned: pairs of a query and a nearer candidate',
    'draws.<rows>.denser_queries': 'k_aligned: queries that remove more rows than with k = 1',
    'draws.<rows>.value_at_cut': 'column: lowest value that is kept, null if no row is kept',
    'draws.<rows>.similarity_at_cut': 'near, far: similarity of the last row that is kept',
    'draws.<rows>.removed': 'matched: rows that the imitated split removes',
    'draws.<rows>.drawn': 'matched: rows drawn in their place',
    'draws.<rows>.drawn_after_merging.<variable>': (
      'matched: rows drawn after cells were merged over this variable'
    ),
    'draws.<rows>.shortfall': 'matched: rows for which no other row could be drawn',
    'draws.<rows>.without_full_cell_donor': (
      'matched: share of the removed rows without an alike row before cells were merged'
    ),
    'draws.<rows>.random_without_full_cell_donor': (
      'matched: that share if as many random rows were removed'
    ),
    'draws.<rows>.no_matched_control': 'matched: this share is too large, so the rows are random',
    'draws.<rows>.standardised_differences.<variable>': (
      'matched: difference of the means of removed and drawn rows in standard deviations'
    ),
    'draws.<rows>.differences_before.<variable>': (
      'matched: the same difference between the removed rows and all other candidates'
    ),
    'draws.<rows>.dropped_by_value.<value>': 'domain_removal: candidates of this value',
    'draws.<rows>.without_value': 'domain_removal: candidates without a value, which are kept',
    'draws.<rows>.clusters': 'clusters: number of k-means clusters of the candidates',
    'draws.<rows>.clusters_kept': 'clusters: those that are the nearest of some reference image',
    'draws.<rows>.reference_rows': 'clusters: reference images with a usable vector',
    'draws.<rows>.file_sha256': 'listed: sha256 of the file',
    'draws.<rows>.listed': 'listed: keys in the file',
    'draws.<rows>.listed_twice': 'listed: keys that it lists more than once',
    'draws.<rows>.not_in_pool': 'listed: keys that the pool does not have',
    'draws.<rows>.several_rows': 'listed: keys that several rows have',
    'draws.<rows>.rows': 'listed: rows of these keys, with repeats',
    'draws.<rows>.not_candidates': 'listed: rows that are no candidates and are left out',
    'draws.<rows>.repeats': 'listed: rows that occur again',
    'domains': 'what the domain of a row is (`prune.domains`), empty if none is known',
    'dropped_share': 'aligned: `dropped` as a share of the candidates',
    **_levels('by_class.<class>'),
    **_levels('by_domain.<domain>'),
    'dropped_at_slack.<slack>': 'aligned: rows that this slack would remove',
    'queries.<benchmark>.queries': 'aligned: usable queries',
    'queries.<benchmark>.hit': 'queries with a removed row nearer than the anchor',
    'queries.<benchmark>.hit_share': 'their share',
    'queries.<benchmark>.leaked': 'queries with a near-duplicate in the anchor',
    'queries.<benchmark>.leaked_share': 'their share',
    'held_back.<benchmark>.aligned': 'usable queries that count for the split (key `queries`)',
    'held_back.<benchmark>.held_back': 'usable queries that do not',
    'held_back.<benchmark>.rows': (
      'candidates that are nearer to a held-back query than any anchor image'
    ),
    'held_back.<benchmark>.rows_removed': 'of these, the rows that the split removes',
    'held_back.<benchmark>.share_removed': 'their share, null if there is no such row',
    'held_back.<benchmark>.excess_before': (
      'mean over held-back queries of the similarity to the nearest candidate or anchor row minus '
      'that to the nearest anchor row'
    ),
    'held_back.<benchmark>.excess_after': 'the same for the rows that the split keeps',
    'held_back.<benchmark>.excess_removed': 'share of it that the split removes',
    'warnings': 'aligned: warnings, such as a domain that is removed almost whole',
    'duplicate_similarity': 'aligned: cosine similarity from which a pair counts as duplicate',
    'slack': 'aligned: slack of the first draw',
    'aligned_dropped': 'aligned: rows that slack 0 removes',
  },
  'splits/sensitivity.json': {
    'embedders': 'names of the embedders; the main one has none',
    'candidates': 'rows that are compared',
    **_under('splits.<split>[].', _AGREEMENT),
    'splits.<split>[].rows_only_here': 'up to 12 rows that only the main embedder removes',
    'splits.<split>[].rows_only_there': 'up to 12 rows that only the further embedder removes',
  },
  # ----------------------------------------------------------------------------------------------
  # train, evaluate
  'train/<split>/seed<k>/checkpoints/': {
    '': 'the last `train.keep_checkpoints` checkpoints of Orbax (and the best one, with '
    '`train.keep_best`): parameters, optimizer, config, moving averages, if any'
  },
  'train/<split>/seed<k>/config.json': {
    'fingerprint': 'fingerprint of the run; a begun run continues only if it is the same',
    'keys': 'config keys that change the run, with their values',
    'inputs': 'fingerprints of the rows and indexes that it reads',
  },
  'train/<split>/seed<k>/metrics.jsonl': {
    'step': 'updates done; one line every `train.log_every_steps`',
    'train/loss': 'loss of the batch',
    'train/logit_scale': 'factor of the similarities (inverse temperature)',
    'train/learning_rate': 'learning rate of the update',
    'train/samples': 'samples seen',
    'train/seconds': 'seconds of training, over restarts',
    'train/images_per_sec': 'images a second since the line before',
    'train/waiting': 'share of the time since the line before in which training waited for images',
    'train/flops_per_sec': 'FLOPs of the model a second since the line before, on all devices; on '
    'known accelerators `train/mfu` is their share of the peak',
  },
  'train/<split>/seed<k>/accuracy.jsonl': {
    'step': 'updates done; one line for each checkpoint and benchmark of `evaluate --follow`',
    'benchmark': 'benchmark of the accuracy',
    'n': 'number of images',
    'groups': 'independent units among the images: `n` if no image has a group',
    'top1': 'zero-shot accuracy of the checkpoint',
    'top1_low': 'lower end of its 95 % interval over images',
    'top1_high': 'upper end of its 95 % interval over images',
    'mean_per_class': 'balanced accuracy: the mean of the accuracies of the classes',
    'fingerprint': 'fingerprint of the run and of the benchmark; only lines that fit both count',
  },
  'evaluate/<split>/seed<k>/<benchmark>.json': {
    'n': 'number of images',
    'classes': 'number of classes that may be predicted',
    'scoring': 'the classes that compete, or the measure, in words',
    'top1': 'zero-shot accuracy',
    'top1_low': 'lower end of its 95 % interval over images',
    'top1_high': 'upper end of its 95 % interval over images',
    'top5': 'share of images whose class is among the first five predictions',
    'mean_per_class': 'balanced accuracy: the mean of the accuracies of the classes',
    'mean_per_class_low': 'lower end of its 95 % interval over images',
    'mean_per_class_high': 'upper end of its 95 % interval over images',
    'interval': 'method of the interval of `top1`',
    'groups': 'independent units among the images: `n` if no image has a group',
    'df': "degrees of freedom of the interval, null for Wilson's or without an interval",
    'per_class': 'accuracy of each class, null without an image',
    'unreadable': 'unreadable images, which count as wrong',
    'templates': 'prompts of the class vectors',
    'warnings': 'sentences: another number of images than the published one, for example',
    'scorings': (
      'name of a further scoring -> its numbers, as above: `scorings` of the benchmark, and for '
      'effective robustness `report.reference` among the classes of another benchmark '
      '(`classes_of_<benchmark>`); in the .npz it has `<name>_counts` (whether an image counts), '
      '`<name>_prediction`, `<name>_correct`'
    ),
    **_under(
      'few_shot.<shots>.',
      {
        'n': (
          'few-shot ridge probe with so many training images a class: number of test images; no '
          'entry if a class has fewer'
        ),
        'groups': 'independent units among them',
        'seeds': 'draws of the training images',
        'top1': 'accuracy',
        'top1_low': 'lower end of its 95 % interval over draws and images',
        'top1_high': 'upper end of its 95 % interval over draws and images',
        'mean_per_class': 'balanced accuracy',
        'mean_per_class_low': 'lower end of its 95 % interval',
        'mean_per_class_high': 'upper end of its 95 % interval',
        'df': 'degrees of freedom of the interval of `top1`',
        'interval': 'its method',
        'training_set': 'dataset of the training images',
        'training_images': 'training images of a draw',
      },
    ),
    'captions': 'retrieval: number of captions; `top1` is image-to-text recall@1',
    'empty_captions': 'retrieval: captions without a character, which count as wrong',
    **_under(
      'recalls.<recall>.',
      {
        'value': (
          'retrieval: image-to-text or text-to-image recall@1, 5 or 10: share of images with a '
          'caption of their own among the k nearest, or of captions whose image is among the k '
          'nearest; a tie counts as wrong'
        ),
        'low': 'lower end of its 95 % interval; captions of one image are one unit',
        'high': 'upper end of its 95 % interval',
        'df': "degrees of freedom of the interval, null for Wilson's",
        'interval': 'method of the interval',
      },
    ),
    'checkpoint': 'checkpoint that was evaluated',
  },
  'evaluate/<split>/seed<k>/<benchmark>.npz': {
    'key': 'key of each image',
    'label': 'class of each image; 0 in retrieval, which has no classes',
    'prediction': 'predicted class, -1 for an unreadable image',
    'top5': 'first five predictions',
    'correct': 'whether the prediction is right; retrieval: the hit of image-to-text recall@1',
    'few_shot_shots': 'few-shot probe: training images a class',
    'few_shot_correct': 'whether its prediction is right: by shots, draw and image',
    'captions': 'retrieval: captions of each image',
    'k': 'retrieval: the k of the columns below',
    'image_to_text': 'whether a caption of the image is among the k nearest',
    'text_to_image': 'share of its captions for which the image is among the k nearest',
  },
  # ----------------------------------------------------------------------------------------------
  # report
  'report/index.html': {'': 'the page, with all figures and tables, in one file'},
  'report/summary.txt': {'': 'the answer and the accuracies, as the terminal shows them'},
  'report/figures/accuracy_by_excess_<benchmark>.svg': {
    '': 'accuracy of base by pool similarity minus anchor similarity'
  },
  'report/figures/accuracy_by_similarity_<benchmark>.svg': {
    '': 'accuracy of base by similarity to the nearest pool image'
  },
  'report/figures/answer_<split>_<benchmark>.svg': {
    '': 'accuracies of the anchor alone, the aligned split, its control and base'
  },
  'report/figures/balance_<split>.svg': {
    '': 'differences of the removed rows from all candidates, and from those of the matched control'
  },
  'report/figures/comparisons.svg': {'': 'each aligned split minus its control'},
  'report/figures/dedup_recall.svg': {'': 'share of duplicate pairs found by number of clusters'},
  'report/figures/dose_<benchmark>.svg': {
    '': (
      'difference to the control by number of removed rows; `_<embedder>` follows for splits of a '
      'further embedder'
    )
  },
  'report/figures/loss.svg': {'': 'training loss of all runs'},
  'report/figures/plane_<benchmark>.svg': {
    '': 'accuracy on the benchmark against accuracy on `report.reference`, one mark a run'
  },
  'report/figures/rows_by_cut_far.svg': {'': 'rows that far-pruning keeps by similarity threshold'},
  'report/figures/rows_by_cut_near.svg': {
    '': 'rows that near-pruning keeps by similarity threshold'
  },
  'report/figures/rows_by_slack.svg': {'': 'rows that gap-aligned pruning removes by slack'},
  'report/figures/similarity_<benchmark>.svg': {
    '': 'similarities of the queries to their nearest pool and anchor image'
  },
  'report/figures/training_<benchmark>.svg': {
    '': 'accuracy of checkpoints by samples seen, from `accuracy.jsonl` of the runs'
  },
  'report/figures/size_<benchmark>.svg': {
    '': (
      'accuracy of near- and far-pruned splits by size; `_<embedder>` follows for splits of a '
      'further embedder'
    )
  },
  'report/tables/accuracy.csv': _ACCURACY,
  'report/tables/accuracy_seeds_<n>.csv': _ACCURACY,
  'report/tables/retrieval.csv': {
    'split': 'split',
    'rule': 'its rule',
    'benchmark': 'retrieval benchmark',
    'measure': 'direction and k of the recall',
    'value': 'recall, mean over seeds',
    **_ESTIMATE,
    'images': 'images, for text-to-image captions, behind the interval',
    'groups': 'independent units among them: images, or groups of images',
  },
  'report/tables/few_shot.csv': {
    'split': 'split',
    'rule': 'its rule',
    'benchmark': 'benchmark with a few-shot probe (`few_shot`)',
    'training_set': 'dataset of the training images',
    'shots': 'training images a class',
    'value': 'accuracy of the ridge probe, mean over seeds and draws of the training images',
    **_ESTIMATE,
    'draws': 'draws of the training images, equal for all runs; the interval takes them as given',
    'lowest_draw': 'accuracy of the worst draw, mean over seeds',
    'highest_draw': 'accuracy of the best draw, mean over seeds',
  },
  'report/tables/accuracy.tex': {
    '': 'the same in percent with intervals, a LaTeX table with booktabs; notes in comments'
  },
  'report/tables/accuracy_seeds_<n>.tex': {'': 'the same as LaTeX'},
  'report/tables/accuracy_by_similarity.csv': {
    'against': '`similarity` to the nearest pool row, or `excess` over the nearest anchor row',
    'series': 'the base split, or `class effects removed`',
    'low': 'lower end of the bin',
    'high': 'upper end of the bin',
    'n': 'images in the bin',
    'accuracy': 'accuracy in the bin',
    'accuracy_low': 'lower end of its 95 % interval; empty for fewer than 20 images, a count',
    'accuracy_high': 'upper end of its 95 % interval',
  },
  'report/tables/balance_<split>.csv': {
    'variable': 'variable on which the matched control is balanced',
    'difference': 'difference of the means of removed and drawn rows in standard deviations',
    'difference_before': 'the same between the removed rows and all other candidates',
  },
  'report/tables/collateral.csv': {
    'split': 'the split',
    'rule': 'its rule',
    'against': 'the split that it is compared with: base, or random rows of its size and budget',
    'benchmark': 'benchmark of the comparison, with all its images',
    'own_benchmark': 'True: its queries choose the rows of the split',
    'budget': '`samples` (equal samples) or `epochs` (equal passes): budget of the split',
    'budget_of_other': 'budget of the split it is compared with',
    'value': 'accuracy of the split minus that of the other, mean over shared seeds',
  },
  'report/tables/comparison_<split>_<benchmark>.csv': {
    'what': (
      '`against_control`, `against_control_bootstrap`, `against_base`: differences of accuracy; '
      '`E`, `E_control`: explained share of the lead over the anchor alone, of base and of the '
      'control; `placebo`: loss beyond that on another benchmark; `hit_minus_unhit`: loss of '
      'queries with removed neighbours beyond that of others; `dose_slope`: log odds of a correct '
      'answer per unit of similarity lost'
    ),
    'p_holm': 'p-value of `against_control` after the correction of Holm, for confirmatory tests',
    'p_no_loss_holm': 'p-value of the equivalence test of the same comparison, after Holm',
  },
  'report/tables/cut_by_size.csv': {
    'rule': '`near` or `far`',
    'keep': 'share of the candidates that is kept',
    'cut': 'similarity threshold for it, rounded to 0.001',
  },
  'report/tables/dedup_audit.csv': _CLUSTERING,
  'report/tables/dedup_chains.csv': {
    'rows': 'rows in a group of duplicates',
    'groups': 'number of such groups',
  },
  'report/tables/dose.csv': {
    'dropped': 'rows that the split removes',
    'slack': 'its slack',
    'share': '`dropped` as a share of what slack 0 removes',
    'estimate': 'accuracy of the split minus that of its control',
  },
  'report/leaks.json': {
    'about': 'what the numbers mean',
    'similarity': 'similarity from which a pair counts as a near-duplicate',
    'complete': 'False: the search was approximate, so pairs may be missing',
    'pool.rows': 'pool rows',
    'pool.skipped': 'samples that the index skipped, which are not searched',
    'pool.files_not_read_to_the_end': 'damaged tars, whose further samples are not known',
    'pool.usable': 'pool rows with a usable vector',
    'benchmarks.<benchmark>.queries': 'usable queries',
    **{
      f'benchmarks.<benchmark>.{kind}.{key}': f'{kind} duplicates: {text}'
      for kind in ('near', 'exact')
      for key, text in _RATE.items()
    },
    'benchmarks.<benchmark>.evidence': 'exact pairs by evidence',
    'benchmarks.<benchmark>.list': 'the list of pairs, in the work directory',
    'embedder': 'content of embedder/embedder.json',
    'versions': 'content of versions.json',
  },
  'report/tables/duplicates-<benchmark>.csv': _PAIRS,
  'report/tables/duplicate_rates.csv': {
    'queries': 'number of queries',
    'similarity': 'similarity from which a pair counts as a near-duplicate',
    'pool': 'queries with a near-duplicate in the pool',
    'pool_share': 'their share',
    'pool_low': 'lower end of its 95 % Wilson interval',
    'pool_high': 'upper end of its 95 % Wilson interval',
    'exact_pool': 'queries with an exact duplicate (equal bytes or pixels) in the pool',
    'anchor': 'queries with a near-duplicate in the anchor',
    'anchor_share': 'their share',
    'anchor_low': 'lower end of its 95 % Wilson interval',
    'anchor_high': 'upper end of its 95 % Wilson interval',
    'exact_anchor': 'queries with an exact duplicate in the anchor',
  },
  'report/tables/embedders.csv': {
    'embedder': 'name in `embedders`, empty for the main embedder',
    'removed': 'candidates that the split removes',
    'candidates': 'number of candidates',
    'also_removed': 'of `removed`, those that the split of the main embedder removes as well',
    'control_rule': '`matched`, `random` (no matched control exists) or `all` (base; no control)',
    'unbalanced': 'variables in which control and split differ beside similarity',
    'value': 'accuracy of the split minus that of its control, mean over shared seeds',
    'share_value': "share of the control's lead over the reference that is lost (E′)",
    'share_low': 'lower end of its 95 % interval',
    'share_high': 'upper end of its 95 % interval',
    'share_method': 'of its interval, as `method`',
    'share_reason': 'why there is no share',
  },
  'report/tables/held_back.csv': {
    'control_rule': '`random` or `all` (base)',
    'queries_from': 'lower end of the key `queries` of the split',
    'queries_to': 'upper end of it',
    'what': (
      '`D_aligned`, `D_held_back`: accuracy of the split minus that of the control, on aligned and '
      'on held-back queries; `A_minus_U`: their difference, standardised by class'
    ),
    'df': 'degrees of freedom of the interval',
    'images': 'queries of this kind',
    'groups': 'groups of them',
    'right_pruned': 'correct answers of the split, over all seeds',
    'right_control': 'correct answers of the control, over all seeds',
    'seeds': 'seeds that both splits have',
    'rows': 'candidates that are nearer to a held-back query than any anchor image',
    'rows_removed': 'of these, the rows that the split removes',
    'share_removed': 'their share',
    'excess_before': (
      'mean over held-back queries: by how much the nearest training image is nearer than the '
      'nearest anchor image'
    ),
    'excess_after': 'the same after the removal',
    'excess_removed': 'share of it that went',
    'conclusion': '`domain`, `instance`, `undetermined` or `cannot tell`',
  },
  'report/tables/mcnemar_<split>_<benchmark>.csv': {
    'seed': 'seed of both runs',
    'aligned_only': 'images that only the aligned split gets right',
    'control_only': 'images that only its control gets right',
    'p_mid': "mid-p of McNemar's exact test",
  },
  'report/tables/nearest_similarity.csv': {
    'in': '`pool` or `anchor`',
    'queries': 'number of queries',
    'q05': '5 % quantile of the similarity to the nearest row',
    'median': 'median of it',
    'q95': '95 % quantile of it',
    'max': 'maximum of it',
  },
  'report/tables/overlap.csv': {
    'also_in': 'another split',
    'share': "share of the split's pool rows that the other split holds, too",
  },
  'report/tables/paper_compat.csv': _PAPER,
  'report/tables/plane.csv': {
    'split': 'split of the run',
    'seed': 'seed of the run',
    'against': 'benchmark on the x axis: `report.reference`',
    'x_scoring': (
      'its further scoring there: among the classes of the other benchmark (`imagenet-r`, '
      '`classes_of_<benchmark>`); empty: all classes'
    ),
    'y_scoring': (
      'further scoring of the benchmark: ObjectNet among its ImageNet classes '
      '(`imagenet_masked`), which the line needs; empty: its own'
    ),
    **{
      f'{axis}_{key}': f'{name}: {meaning}'
      for axis, name in (('x', 'accuracy on it'), ('y', 'accuracy on the benchmark'))
      for key, meaning in {'value': 'of this run', **_ESTIMATE}.items()
    },
  },
  'report/tables/planted_calibration.csv': {
    'embedder': 'name of the embedder, empty for the main one',
    'duplicate_similarity': 'similarity from which a pair counts as a duplicate',
    **_COPIES,
  },
  'report/tables/planted_contrast.csv': {
    'base': 'split without copies',
    'what': (
      'gain in accuracy over base: of `planted` queries, of `others`, or their difference, '
      '`planted_minus_others`'
    ),
  },
  'report/tables/planted_duplicates.csv': {
    'kind': '`exact` or `near` copies that the demo draws into its pool',
    'planted': 'their number',
    'found': 'copies that de-duplication marks, or whose original it marks',
    'recall': 'share of the copies that is found',
  },
  'report/tables/preview.csv': {
    'n': 'images whose class has training rows',
    'accuracy': 'accuracy of the ridge regression',
    'embedder': 'embedder of the features',
    'rows': 'rows of the split',
    'labelled': 'rows with a class',
    'l2': 'weight of the L2 penalty',
  },
  'report/tables/removed_by_class_<split>.csv': {'what': 'class', **_REMOVED_BY},
  'report/tables/removed_by_domain_<split>.csv': {'what': 'domain', **_REMOVED_BY},
  'report/tables/rows_by_slack.csv': {
    'benchmark': 'benchmark, or all together',
    'slack': 'slack',
    'dropped': 'candidates that gap-aligned pruning would remove',
    'candidates': 'number of candidates',
  },
  'report/tables/sensitivity.csv': _AGREEMENT,
  'report/tables/settings.csv': {'what': 'name of a setting', 'value': 'its value'},
  'report/tables/size_against_random.csv': {
    'rule': '`near` or `far`',
    'control': 'random split of the same size',
    'value': 'accuracy of the split minus that of the random split',
  },
  'report/tables/skipped.csv': {
    'dataset': 'dataset',
    'key': 'key of the sample, or its row',
    'reason': 'why it was skipped, or `unreadable image`',
  },
  'report/tables/slack_<split>.csv': {
    'slack': 'slack',
    'dropped': 'rows that it would remove',
  },
  'report/tables/training.csv': {
    'run': '<split>/seed<k>',
    'samples': 'samples seen',
    'passes': 'passes over the split',
    'steps': 'updates',
    'seconds': 'seconds of training',
    'images_per_sec': 'images a second',
    'mark': '`not finished` or `not converged`',
  },
  'report/tables/versions.csv': {'what': 'package or property', 'value': 'its version or value'},
  'report/tables/wall_clock.csv': {
    'stage': 'stage',
    'seconds': 'seconds it took, over all commands',
  },
  'report/tables/words_<split>.csv': {
    **_WORDS,
    'odds_ratio': 'odds of the word in removed captions divided by those in kept captions',
  },
  'report/tables/words_<split>_kept.csv': {
    **_WORDS,
    'odds_ratio': 'odds of the word in kept captions divided by those in removed captions',
  },
  # ----------------------------------------------------------------------------------------------
  # counts in sidecars
  'counts of dedup/audit': {
    'rows': 'rows in the sample',
    'pairs': 'near-duplicate pairs of a sampled row',
    'recall': 'share of them inside one cluster',
  },
  'counts of dedup/keep': {
    'usable': 'usable rows',
    'duplicates': 'rows that are marked',
    'clusters': 'clusters',
    'iterations': 'passes of k-means',
    'changed': 'rows that changed their cluster in the last pass',
    'largest_cluster': 'rows of the largest cluster',
  },
  'counts of embedder/embedder': {'': 'the keys of `embedder.json`'},
  'counts of evaluate/<split>/seed<k>/<benchmark>': {
    'n': 'images',
    'top1': 'zero-shot accuracy',
  },
  'counts of ingest/<dataset>/index': {
    'shards': 'shards',
    'unlabelled': 'samples without a label',
  },
  'counts of ingest/glyphs/tars': {
    '<set>.samples': 'samples of the set',
    '<set>.letters': 'letters among them',
    '<set>.exact': 'exact copies among them',
    '<set>.near': 'near copies among them',
    '<set>.broken.<kind>': 'keys of broken samples of this kind',
    '<set>.domains.<domain>': 'samples of this domain',
  },
  'counts of ingest/planted/tars/<i>': {
    'kinds.<kind>': 'copies of this kind',
    'queries': 'copied queries',
    'unreadable': 'queries that could not be read, and why',
  },
  'counts of report/index': {'.svg': 'figures', '.csv': 'tables', '.tex': 'LaTeX tables'},
  'counts of search/<benchmark>/pairs-k<K>-<i>': {
    'pairs': 'pairs',
    'rows_revisited': 'rows of the shard that were compared again',
  },
  'counts of search/<benchmark>/paper': {'': 'the keys of `paper.json`'},
  'counts of search/sizes': {'candidates': 'candidates'},
  'counts of splits/domains': {'clusters': 'number of clusters'},
  'counts of splits/<split>/rows': {'': 'those of `draws.<rows>` in `split.json`'},
  'counts of splits/<split>/rows-seed<k>': {'': 'those of `draws.<rows>` in `split.json`'},
  'counts of train/<split>/seed<k>/run': {
    'rows': 'rows of the split',
    'samples': 'samples seen',
    'passes': 'passes over the split',
    'steps': 'updates',
    'digest': 'sha256 of the parameters',
    'replaced': 'rows whose image was unreadable and replaced by the next',
  },
}

ANY_FILE = {
  'report/tables/': {
    'split': 'name of the split',
    'benchmark': 'name of the benchmark',
    'control': 'control of the split',
    'control_rule': 'rule of its rows; `random` where no matched control exists',
    'value': 'estimate',
    **_ESTIMATE,
  },
  'splits/<split>/export/': {'<file>': 'samples in each file of the copies'},
  'counts of search/': {'queries': 'queries', 'unusable': 'queries without a usable vector'},
  'counts of splits/<split>/export/': {
    'keys': 'keys in the list',
    'several_rows': 'keys that name several rows of the pool',
    'members': 'files in the tars',
    'bytes': 'bytes',
    'sha256': 'sha256 of the file',
    'copied': 'samples whose bytes were copied unchanged',
    'renamed': 'samples with a number after their key, which another sample has already',
    'refused': 'samples left out because unpacking them could write outside the folder',
  },
  'counts of ': {
    'rows': 'rows',
    'samples': 'samples',
    'skipped': 'samples that cannot be used',
    'left_out': 'samples that the config leaves out',
    'reasons.<reason>': 'samples skipped for this reason',
    'unreadable': 'images that cannot be read',
  },
}
