// Tables that sort and search (DataTables), the filters of the ledger, links that open what they point to, and everything unfolded in print.
function openTarget() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)))
  if (!target) return
  for (const d of target.querySelectorAll('details.claim')) d.open = true
  for (let d = target.closest('details'); d; d = d.parentElement.closest('details')) d.open = true
  target.scrollIntoView()
}

function ledger(table) {
  const choice = name => document.getElementById(`filter-${name}`)
  const shown = document.getElementById('ledger-count')
  const api = new DataTable(table, {
    paging: false, info: false, autoWidth: false, order: [[0, 'asc']], layout: {topStart: null, topEnd: null, bottomStart: null, bottomEnd: null},
    columnDefs: [{targets: 'unsorted', orderable: false}],
  })
  const count = () => { shown.textContent = `${api.rows({search: 'applied'}).count()} of ${api.rows().count()} claims` }
  DataTable.ext.search.push((settings, _, index) => {
    if (settings.nTable !== table) return true
    const row = api.row(index).node(), verdict = choice('verdict').value, paper = choice('paper').value, tier = choice('tier').value
    const verdicts = [...row.querySelectorAll('td[data-tier]')].filter(c => !tier || c.dataset.tier === tier).map(c => c.dataset.verdict)
    return (!paper || row.dataset.paper === paper) && (!verdict || verdicts.includes(verdict))
  })
  choice('text').addEventListener('input', e => api.search(e.target.value).draw())
  for (const name of ['verdict', 'paper', 'tier']) choice(name).addEventListener('change', () => api.draw())
  choice('sort').addEventListener('change', e => api.order([Number(e.target.value), 'asc']).draw())
  api.on('draw', count)
  count()
  document.getElementById('unfold-all').addEventListener('click', () => {
    const all = [...table.querySelectorAll('details.claim')], open = all.some(d => !d.open)
    for (const d of all) d.open = open
  })
}

document.addEventListener('DOMContentLoaded', () => {
  if (window.DataTable) {
    for (const table of document.querySelectorAll('table.ledger')) ledger(table)
    for (const table of document.querySelectorAll('table.data')) new DataTable(table, {paging: false, info: false, searching: false, autoWidth: false, order: []})
  }
  openTarget()
})
window.addEventListener('hashchange', openTarget)
let unfolded = []
window.addEventListener('beforeprint', () => { unfolded = [...document.querySelectorAll('details:not([open])')]; for (const d of unfolded) d.open = true })
window.addEventListener('afterprint', () => { for (const d of unfolded) d.open = false })
