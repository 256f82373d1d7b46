// The report page's script: tables that sort, galleries that enlarge. The page is complete without it.
'use strict';

const words = new Intl.Collator('en', {numeric: true, sensitivity: 'base'});

// A cell's number: its data-value, else the first number of its text ('1,420', '-3.1', 'p < 0.001').
// NaN: the cell holds text. null: the cell is empty or a dash.
function numberOf(cell) {
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.querySelector('.v').textContent.trim();
  if (!text || text === '\u2013') return null;
  const match = /^(?:p\s*)?[<>=~]?\s*([+\u2212-]?(?:\d[\d,]*)?\.?\d+(?:e[+-]?\d+)?)/i.exec(text);
  return match ? Number(match[1].replace(/,/g, '').replace('\u2212', '-')) : NaN;
}

// Compares rows by one column; rows without a value are last in either direction.
function comparison(rows, column, direction) {
  const cellOf = (row) => row.cells[column];
  const number = new Map(rows.map((row) => [row, numberOf(cellOf(row))]));
  const isText = [...number.values()].some(Number.isNaN);
  const text = (row) => cellOf(row).textContent;
  return (a, b) => {
    const x = number.get(a), y = number.get(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return direction * (isText ? words.compare(text(a), text(b)) : x - y);
  };
}

// Makes the heads of a table buttons: ascending, descending, the page's own order.
function sortable(table) {
  const body = table.tBodies[0], original = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const next = {none: 'ascending', ascending: 'descending', descending: 'none'};
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute('aria-sort', 'none');
    button.addEventListener('click', () => {
      const order = next[head.getAttribute('aria-sort')];
      heads.forEach((other) => other.hasAttribute('aria-sort') && other.setAttribute('aria-sort', 'none'));
      head.setAttribute('aria-sort', order);
      const direction = order === 'descending' ? -1 : 1;
      const rows = order === 'none' ? original : [...original].sort(comparison(original, column, direction));
      body.append(...rows);
    });
  });
}

// Enlarges a gallery's pictures in one dialog. Each gallery is one stop of the Tab key; the arrow
// keys move within it.
function lightbox(galleries) {
  const dialog = document.createElement('dialog');
  dialog.className = 'lightbox';
  dialog.setAttribute('aria-label', 'Enlarged picture');
  const image = document.createElement('img'), caption = document.createElement('p');
  const close = document.createElement('button');
  close.type = 'button';
  close.textContent = 'Close';
  dialog.append(image, caption, close);
  document.body.append(dialog);
  let pictures = [], shown = 0;

  const focus = (k) => {
    pictures.forEach((picture, i) => (picture.tabIndex = i === k ? 0 : -1));
    pictures[k].focus();
  };
  const show = (k) => {
    shown = k;
    const picture = pictures[k];
    image.src = picture.src;
    image.alt = picture.alt;
    image.className = picture.className;
    const line = picture.parentElement.querySelector('small').textContent;
    const group = picture.closest('.group').querySelector('p').textContent;
    const parts = [group, picture.alt.startsWith(line) ? '' : line, picture.alt];
    caption.textContent = parts.filter(Boolean).join(' \u00b7 ');
    if (!dialog.open) dialog.showModal();
  };
  const step = (key) => ({ArrowRight: 1, ArrowLeft: -1})[key] || 0;
  const moved = (k, by) => (k + by + pictures.length) % pictures.length;

  dialog.addEventListener('click', (event) => {
    if (event.target === dialog || event.target === close) dialog.close();
  });
  dialog.addEventListener('keydown', (event) => {
    if (step(event.key)) show(moved(shown, step(event.key)));
  });
  dialog.addEventListener('close', () => focus(shown)); // Escape closes a dialog by itself

  galleries.forEach((gallery) => {
    const own = [...gallery.querySelectorAll('.picture img')];
    own.forEach((picture, k) => {
      picture.tabIndex = k ? -1 : 0;
      picture.setAttribute('role', 'button');
      const open = () => {
        pictures = own;
        show(k);
      };
      picture.addEventListener('click', open);
      picture.addEventListener('keydown', (event) => {
        pictures = own;
        if (event.key === 'Enter' || event.key === ' ') open();
        else if (step(event.key)) focus(moved(k, step(event.key)));
        else return;
        event.preventDefault();
      });
    });
  });
}

document.querySelectorAll('figure.table:not(.stacked) table').forEach((table) => {
  if (table.tHead.rows[0].cells.length && table.tBodies[0].rows.length > 1) sortable(table);
});
lightbox(document.querySelectorAll('figure.gallery'));
