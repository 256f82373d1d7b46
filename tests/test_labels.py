import json

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import filetree, folder, labels


def _touch(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b'x')


def _labels(root, class_names=(), file=''):
  """Returns path -> label, or the reason for none, of all images."""
  told = labels.labels(str(root), class_names, str(file))
  found = {}
  for path in folder.paths(str(root)):
    try:
      found[path] = told.label_of(path)
    except labels.NoLabel as reason:
      found[path] = str(reason)
  return found


def _val(tmp_path, count=4):
  """A flat folder as ImageNet's val often is, and where a file of labels may lie."""
  _touch(tmp_path / 'val', *(f'ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, count + 1)))
  return tmp_path / 'val', tmp_path / 'labels.txt'


def _said(root, file, text, class_names=()):
  """Returns the labels in the images' order."""
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  found = _labels(root, class_names, file)
  return [found[name] for name in sorted(found)]


def test_class_folders_are_places_numbers_or_ranks(tmp_path):
  _touch(tmp_path / 'wnid', 'n02/a.png', 'n01/sub/a.png', 'n10/a.JPG', 'empty/.a.png', 'b.png')
  _touch(tmp_path / 'number', *(f'{i}/a.png' for i in (0, 2, 10)))
  ranks = {'n01/sub/a.png': 0, 'n02/a.png': 1, 'n10/a.JPG': 2, 'b.png': -1}
  assert _labels(tmp_path / 'wnid') == _labels(tmp_path / 'wnid', ('x', 'y', 'z')) == ranks
  assert _labels(tmp_path / 'wnid', ('n10', 'n02', 'n01')) == {
    **ranks,
    'n10/a.JPG': 0,
    'n01/sub/a.png': 2,
  }
  assert _labels(tmp_path / 'wnid', ('n02', 'z')) == {
    'n01/sub/a.png': 'bad label',
    'n02/a.png': 0,
    'n10/a.JPG': 'bad label',
    'b.png': -1,
  }
  assert _labels(tmp_path / 'number') == {'0/a.png': 0, '2/a.png': 2, '10/a.png': 10}
  assert _labels(tmp_path / 'number', ('x', 'y', 'z')) == {
    '0/a.png': 0,
    '2/a.png': 2,
    '10/a.png': 'bad label',
  }
  with pytest.raises(InputError, match='wnid: none of the 1000 classes is one of the 3 folders'):
    labels.labels(str(tmp_path / 'wnid'), [f'class {i}' for i in range(1000)])
  _touch(tmp_path / 'flat', 'a.png')
  assert _labels(tmp_path / 'flat') == {'a.png': -1}
  with pytest.raises(InputError, match='flat.* has no class folders.*labels_file'):
    labels.labels(str(tmp_path / 'flat'), ('cat', 'dog'))
  with pytest.raises(InputError, match='is not a folder'):
    labels.labels(str(tmp_path / 'nowhere'))


def test_imagenet_v2_is_labelled_by_numbers_and_not_by_sorted_order(tmp_path):
  _touch(tmp_path, *(f'{i}/a.jpeg' for i in range(1000)))
  told = labels.labels(str(tmp_path), [f'class {i}' for i in range(1000)])
  assert all(told.label_of(f'{i}/a.jpeg') == i for i in range(1000))
  assert sum(place != int(name) for place, name in enumerate(sorted(map(str, range(1000))))) == 988
  assert 'their numbers' in told.description


def test_dates_are_no_class_numbers(tmp_path):
  _touch(tmp_path, '20240101/a.png', '20240102/a.png')
  assert set(_labels(tmp_path).values()) == {0, 1}
  assert labels.labels(str(tmp_path)).classes == ('20240101', '20240102')


@pytest.mark.parametrize(
  'names', [('n01', 'n02', 'n10'), ('0', '2', '10'), ('00', '01'), ('a b', 'c')]
)
def test_the_classes_that_are_found_give_the_same_labels(tmp_path, names):
  _touch(tmp_path, *(f'{name}/a.png' for name in names))
  assert _labels(tmp_path) == _labels(tmp_path, labels.labels(str(tmp_path)).classes)


def _objectnet(tmp_path):
  top = tmp_path / 'objectnet-1.0'
  _touch(
    top,
    *(f'images/{name}/1.png' for name in ('alarm_clock', 'air_freshener', 't-shirt', 'unknown')),
  )
  (top / 'mappings').mkdir()
  (top / 'mappings/folder_to_objectnet_label.json').write_text(
    json.dumps(
      {
        't-shirt': 'T-shirt',
        'air_freshener': 'Air freshener',
        'alarm_clock': 'Alarm clock',
        'bench': 'Bench',
      }
    )
  )
  (top / 'mappings/objectnet_to_imagenet_1k.json').write_text(
    json.dumps(
      {
        'T-shirt': 'jersey, T-shirt, tee shirt',
        'Alarm clock': 'analog clock',
        'Bench': 'park bench',
      }
    )
  )
  return top


def test_objectnet_is_recognised_and_only_its_shared_names_are_asked_for(tmp_path):
  top = _objectnet(tmp_path)
  for root, inside in ((top, 'images/'), (top / 'images', '')):
    expected = {
      f'{inside}alarm_clock/1.png': 0,
      f'{inside}t-shirt/1.png': 2,
      f'{inside}air_freshener/1.png': None,
      f'{inside}unknown/1.png': None,
    }
    told = labels.labels(str(root))
    assert told.classes == ('Alarm clock', 'Bench', 'T-shirt')
    assert (
      '3 names' in told.description
      and '2 of them with images' in told.description
      and 'ObjectNet' in told.description
    )
    assert (
      _labels(root)
      == expected
      == _labels(root, told.classes)
      == _labels(root, ('clock', 'couch', 'shirt'))
    )
    for names in (('T-shirt', 'Bench', 'Alarm clock'), ('t-shirt', 'bench', 'alarm clock', 'more')):
      assert _labels(root, names)[f'{inside}t-shirt/1.png'] == 0
    found, _ = folder.samples(str(root), filetree.source_files(str(root), sorted(expected)))
    assert {sample.folder for sample in found} == {
      'alarm_clock',
      't-shirt',
      'air_freshener',
      'unknown',
    }
  with pytest.raises(InputError, match="ObjectNet's names.*'Alarm clock' .1 of 3"):
    labels.labels(str(top), ('bench', 't-shirt'))
  with pytest.raises(InputError, match='none of the 2 classes is one of the 3 names of ObjectNet'):
    labels.labels(str(top), ('a', 'b'))
  assert (
    labels.labels(str(top / 'images/alarm_clock')).classes == ()
  )  # a folder inside is not the set


@pytest.mark.parametrize('text', ['[]', '{"T-shirt": 1', '{"Sofa": "couch"}'])
def test_objectnet_with_damaged_mappings_is_not_guessed(tmp_path, text):
  top = _objectnet(tmp_path)
  (top / 'mappings/objectnet_to_imagenet_1k.json').write_text(text)
  with pytest.raises(InputError, match='objectnet_to_imagenet_1k.json'):
    labels.labels(str(top))


def test_a_file_names_images_in_each_form(tmp_path):
  val, file = _val(tmp_path, 3)
  name = 'ILSVRC2012_val_0000000{}'.format
  wnids = ['n02', 'n01', 'n02']
  lines = [f'{name(i + 1)}.JPEG {wnid}' for i, wnid in enumerate(wnids)]
  kaggle = [
    'ImageId,PredictionString',
    *(f'{name(i + 1)},{wnid} 1 2 3 4 n09 5 6 7 8 ' for i, wnid in enumerate(wnids)),
  ]
  for text in (
    '\n'.join(lines),
    '\n'.join(lines[::-1]),
    '\r\n'.join(['\ufeff' + lines[0], '', *lines[1:], '']),
    '# said by hand\n' + '\n\n'.join(line.replace(' ', '\t') for line in lines),
    '\n'.join('val/' + line for line in lines),
    '\n'.join('./' + line.replace(' ', ',') for line in lines),
    '\n'.join(kaggle),
    '\r\n'.join(kaggle[:1] + kaggle[:0:-1]),
    '\n'.join(wnids),
    '\r\n'.join(wnids) + '\r\n\r\n',
    'name,class\n' + '\n'.join(f'"{name(i + 1)}.JPEG","{wnid}"' for i, wnid in enumerate(wnids)),
    json.dumps({f'{name(i + 1)}.JPEG': wnid for i, wnid in enumerate(wnids)}),
    json.dumps({name(i + 1): wnid for i, wnid in enumerate(wnids)}, indent=2),
  ):
    assert _said(val, file, text) == [1, 0, 1], text
    assert labels.labels(str(val), (), str(file)).classes == ('n01', 'n02')
    assert _said(val, file, text, ('n02', 'n03', 'n01')) == [0, 2, 0]
    assert _said(val, file, text, ('tench', 'shark')) == [
      1,
      0,
      1,
    ]  # as many names as wnids: in sorted order
    assert 'labels.txt: 3 of 3 images' in labels.labels(str(val), (), str(file)).description


def test_numbers_count_from_0(tmp_path):
  val, file = _val(tmp_path, 3)
  named = '\n'.join(f'ILSVRC2012_val_0000000{i + 1}.JPEG {n}' for i, n in enumerate((65, 0, 3)))
  object_ = json.dumps({f'ILSVRC2012_val_0000000{i + 1}': n for i, n in enumerate((65, 0, 3))})
  for text in (named, '65\n0\n3\n', object_):
    assert _said(val, file, text) == [65, 0, 3]
    assert labels.labels(str(val), (), str(file)).classes == tuple(map(str, range(66)))
    assert _said(val, file, text, [f'class {i}' for i in range(1000)]) == [65, 0, 3]
    with pytest.raises(InputError, match='has the class 65.* 50 classes, 0 to 49'):
      _said(val, file, text, [f'class {i}' for i in range(50)])
  for text, what in (
    ('1\n-1\n0', "'-1'"),
    ('1\n0.5\n0', "'0.5'"),
    ('1\n+2\n0', "'\\+2'"),
    ('1\n0\n100000', '100000'),
  ):
    with pytest.raises(InputError, match=what):
      _said(val, file, text)
  with pytest.raises(InputError, match='both numbers and names'):
    _said(val, file, '1\n0\nn01')
  assert _said(val, file, 'b\n1\n1', ('1', 'b')) == [
    1,
    0,
    0,
  ]  # names of the config, though one is a number


def test_the_devkits_numbers_are_refused(tmp_path):
  val, file = _val(tmp_path, 1000)
  classes = [f'class {i}' for i in range(1000)]
  order = [(i * 7) % 1000 + 1 for i in range(1000)]
  named = '\n'.join(f'ILSVRC2012_val_{i + 1:08d}.JPEG {n}' for i, n in enumerate(order))
  alone = '\n'.join(map(str, order))
  for text, names in ((alone, classes), (alone, ()), (named, classes), (named, ())):
    with pytest.raises(
      InputError, match='ILSVRC2012_validation_ground_truth.txt of the devkit counts from 1'
    ):
      _said(val, file, text, names)
  zero = '\n'.join(str(n - 1) for n in order)
  assert _said(val, file, zero, classes) == [n - 1 for n in order]


def test_a_file_in_order_must_say_each_image_and_the_order_must_be_clear(tmp_path):
  val, file = _val(tmp_path, 3)
  for text in ('n01\nn02', 'n01\nn02\nn03\nn04', '', '# nothing\n'):
    with pytest.raises(InputError, match='names no image of .* for 3 images'):
      _said(val, file, text)
  with pytest.raises(InputError, match='an image without a class'):
    _said(val, file, '\n'.join(f'ILSVRC2012_val_0000000{i}.JPEG' for i in (1, 2, 3)))
  other = tmp_path / 'other'
  _touch(other, '9.png', '10.png')
  with pytest.raises(InputError, match='the order of the images is ambiguous'):
    _said(other, file, 'n01\nn02')
  assert _labels(other, (), _write(file, '9 n01\n10 n02')) == {'9.png': 0, '10.png': 1}
  _touch(tmp_path / 'stems', '1.png', '2.png')  # numbers that are names of images, too
  assert _labels(tmp_path / 'stems', (), _write(file, '0\n1')) == {'1.png': 0, '2.png': 1}


def _write(file, text):
  file.write_text(text)
  return file


def test_a_rank_counts_all_classes_of_the_file_also_of_images_that_are_not_there(tmp_path):
  val, file = _val(tmp_path, 2)
  lines = [
    f'ILSVRC2012_val_{i:08d}.JPEG n{i * 7 % 10:02d}' for i in range(1, 11)
  ]  # images 1 and 2 are n07 and n04
  kaggle = ['ImageId,PredictionString'] + [
    f'ILSVRC2012_val_{i:08d},n{i * 7 % 10:02d} 1 2 3 4' for i in range(1, 11)
  ]
  heading = ['image,class'] + [line.replace(' ', ',') for line in lines]
  object_ = json.dumps(dict(line.split() for line in lines))
  for text in ('\n'.join(lines), '\n'.join(kaggle), '\n'.join(heading), object_):
    assert _said(val, file, text) == [7, 4]
    assert _said(val, file, text, [f'class {i}' for i in range(10)]) == [7, 4]
    assert _said(val, file, text, ('n04', 'n07')) == [
      1,
      0,
    ]  # the others matter not: their images are not there
    with pytest.raises(InputError, match="'n04', which is not one of the 1 classes"):
      _said(val, file, text, ('n07',))
    assert labels.labels(str(val), (), str(file)).classes == tuple(f'n{i:02d}' for i in range(10))


def test_classes_and_files_that_cannot_be_read_are_a_sentence(tmp_path):
  val, file = _val(tmp_path, 2)
  for text, names, what in (
    ('n01\nn09', ('n01', 'n02'), "'n09', which is not one of the 2 classes"),
    ('n01\nn09', ('a', 'b', 'c'), "'n01', which is not one of the 3 classes"),
    (b'\xff\xfe', (), 'not UTF-8'),
    ('{"a": ', (), 'not valid JSON'),
    ('{"a": 1}', (), 'names no image'),
    ('{' * 100_000, (), 'not valid JSON'),
    ('{"a":' * 50_000 + '1' + '}' * 50_000, (), 'JSON'),
    ('{"ILSVRC2012_val_00000001": [1]}', (), 'a class must be a name'),
    ('{"ILSVRC2012_val_00000001": true}', (), 'a class must be a name'),
  ):
    with pytest.raises(InputError, match=what):
      _said(val, file, text, names)
  with pytest.raises(InputError, match='cannot be read'):
    labels.labels(str(val), (), str(tmp_path / 'nowhere'))
  with pytest.raises(InputError, match='cannot be read'):
    labels.labels(str(val), (), str(tmp_path))


@settings(max_examples=60, deadline=None)
@given(
  st.binary(max_size=60) | st.text(alphabet='01n.,\t"{}:#\r\n /a', max_size=60).map(str.encode),
  st.sampled_from([(), ('n01', 'n1'), ('0', '1')]),
)
def test_any_bytes_are_labels_or_a_sentence(tmp_path_factory, data, names):
  root = tmp_path_factory.mktemp('any')
  _touch(root / 'i', '0.png', '1.png', 'n/a.png')
  (root / 'f').write_bytes(data)
  try:
    found = _labels(root / 'i', names, root / 'f')
  except InputError:
    return
  assert all(
    label == 'no label'
    or 0 <= label < len(labels.labels(str(root / 'i'), names, str(root / 'f')).classes)
    for label in found.values()
  )


def _published(root, *folders, leaves_out=False, labels_=(0, 1, 2), file=''):
  _touch(root, *(f'{name}/a.jpg' for name in folders))
  namings = (('n00000010', 'n00000020', 'n00000030'), ('0', '1', '2'))
  wanted = labels.ClassFolders(namings, labels_, leaves_out)
  found = labels.labels(str(root), ('cat', 'dog', 'emu'), file, wanted)
  return [found.label_of(f'{name}/a.jpg') for name in folders]


def test_a_published_benchmark_has_exactly_its_class_folders(tmp_path):
  assert _published(tmp_path / 'wnids', 'n00000030', 'n00000010', 'n00000020') == [2, 0, 1]
  assert _published(tmp_path / 'numbers', '2', '0', '1') == [2, 0, 1]
  two = ('n00000030', 'n00000010')
  assert _published(tmp_path / 'part', *two, labels_=(0, 2)) == [2, 0]
  with pytest.raises(InputError, match="lacks the class folder 'n00000020', .* 3 .* 1 are missing"):
    _published(tmp_path / 'missing', *two)
  with pytest.raises(InputError, match="the folder 'n00000020', which is no class"):
    _published(tmp_path / 'extra', *two, 'n00000020', labels_=(0, 2))
  with pytest.raises(InputError, match="'2', which is no class"):
    _published(tmp_path / 'mixed', *two, 'n00000020', '2')
  with pytest.raises(InputError, match="no class folder .*'n00000010'; its folders .* x"):
    _published(tmp_path / 'other', 'x')


def test_further_folders_of_a_published_benchmark_may_be_left_out(tmp_path):
  folders = ('n00000010', 'n00000020', 'n00000030', 'other')
  assert _published(tmp_path, *folders, leaves_out=True) == [0, 1, 2, None]


def test_an_image_outside_the_class_folders_is_named(tmp_path):
  folders = ('n00000010', 'n00000020', 'n00000030')
  _published(tmp_path, *folders)
  wanted = labels.ClassFolders((folders,), (0, 1, 2), False)
  with pytest.raises(labels.NoLabel, match='outside the class folders'):
    labels.labels(str(tmp_path), ('a', 'b', 'c'), '', wanted).label_of('stray.jpg')


def test_a_file_may_name_some_wnids_of_a_published_benchmark(tmp_path):
  _touch(tmp_path / 'flat', 'a.jpg', 'b.jpg')
  _write(tmp_path / 'truth.txt', 'a.jpg n00000030\nb.jpg n00000010\n')
  wanted = labels.ClassFolders((('n00000010', 'n00000020', 'n00000030'),), (0, 2), False)
  found = labels.labels(
    str(tmp_path / 'flat'), ('cat', 'dog', 'emu'), str(tmp_path / 'truth.txt'), wanted
  )
  assert [found.label_of(name) for name in ('a.jpg', 'b.jpg')] == [2, 0]
