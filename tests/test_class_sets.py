"""The tables of the ImageNet family: complete, in order, and of one mapping."""

from hashlib import sha256

import pytest

from clip_jax.evaluation import class_sets

NAMES = class_sets.by_name('imagenet').names


def names_of(labels) -> set[str]:
  return {NAMES[label] for label in labels}


def test_wnids_are_the_published_ones_in_order():
  wnids = class_sets.wnids()
  assert len(wnids) == len(set(wnids)) == 1000 and list(wnids) == sorted(wnids)
  assert (wnids[0], NAMES[0]) == ('n01440764', 'tench')
  assert (wnids[999], NAMES[999]) == ('n15075141', 'toilet paper')  # toilet tissue
  assert (wnids[657], wnids[744]) == ('n03773504', 'n04008634')  # two classes named missile
  assert NAMES[657] == NAMES[744] == 'missile'
  digest = '385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd'
  assert sha256('\n'.join(wnids).encode()).hexdigest() == digest


@pytest.mark.parametrize(
  'name, first, digest',
  [
    ('imagenet-a', 6, 'f6aa4b23244554d9b864fd715ae20048f6a9686388911b2dfbf1ada01bf0f520'),
    ('imagenet-r', 1, 'e19a59d84e3746fafd34d2ccf6ae604a44e9a0500a596f343c878a89e30ce624'),
  ],
)
def test_a_and_r_have_200_classes(name, first, digest):
  labels = class_sets.by_name(name).labels
  assert len(labels) == 200 and list(labels) == sorted(set(labels))
  assert (labels[0], labels[-1]) == (first, 988)
  lines = '\n'.join(class_sets.wnids()[label] for label in labels)
  assert sha256(lines.encode()).hexdigest() == digest
  scoring = class_sets.scoring('imagenet', name)
  assert [i for i, meaning in enumerate(scoring.meaning) if meaning >= 0] == list(labels)
  assert all(scoring.meaning[label] == label for label in labels)


def test_objectnets_113_classes_have_125_labels_of_imagenet():
  rows = class_sets.objectnet()
  found = class_sets.by_name('objectnet')
  assert len(rows) == 113 and [row[0] for row in rows] == sorted(row[0] for row in rows)
  labels = [label for _, _, ids in rows for label in ids]
  assert len(labels) == len(set(labels)) == 125
  by_folder = {folder: names_of(ids) for _, folder, ids in rows}
  assert by_folder['bicycle'] == {'mountain bike', 'tandem bicycle'}
  assert by_folder['chair'] == {'barber chair', 'folding chair', 'rocking chair'}
  assert by_folder['still_camera'] == {'Polaroid camera', 'reflex camera'}
  assert found.names[found.folder_names[0].index('full_sized_towel')] == 'bath towel'
  for is_masked, name in ((False, 'imagenet'), (True, 'imagenet_masked')):
    scoring = class_sets.scoring('objectnet', name)
    assert scoring.is_masked is is_masked and not scoring.translates_labels
    for label, (_, _, ids) in enumerate(rows):
      assert [i for i, meaning in enumerate(scoring.meaning) if meaning == label] == sorted(ids)


def test_every_class_set_is_consistent():
  for name in class_sets.SETS:
    found = class_sets.by_name(name)
    assert found.scoring and set(found.labels) <= set(range(len(found.names)))
    for naming in found.folder_names:
      assert len(naming) == len(set(naming)) == len(found.names)
