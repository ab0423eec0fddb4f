// The stage of the panel and of the page: one figure per view, drawn again when it changes, and clicks sent back.
// `Plotly` is defined in front of this text.
let clicks = 0;

const made = (kind, name, parent) => {
  const element = document.createElement(kind);
  element.className = name;
  parent.append(element);
  return element;
};

function addView(name, model, el) {
  const section = made("section", "", el);
  section.dataset.view = name;
  section.setAttribute("aria-label", name);
  const scroll = made("div", "scroll", section);
  const plot = made("div", "plot", scroll);
  const message = made("p", "message", section);
  const details = made("details", "", section);
  made("summary", "", details).textContent = "code";
  const code = made("pre", "", details);
  code.tabIndex = 0;
  const send = ({points: [point]}) => {
    model.set("clicked", {view: name, curve: point.curveNumber, x: point.x, y: point.y, number: ++clicks});
    model.save_changes();
  };
  const draw = async () => {
    const {figure, message: said, code: call} = model.get(name);
    message.textContent = said;
    code.textContent = call;
    scroll.hidden = !figure;
    if (!figure || !scroll.clientWidth) return;  // not on the page yet: the observer draws it once it is
    const layout = {width: scroll.clientWidth, ...figure.layout};
    await Plotly.react(plot, figure.data, layout, {displaylogo: false});
    plot.removeAllListeners("plotly_click");
    plot.on("plotly_click", send);
  };
  let width = 0;
  new ResizeObserver(() => {
    if (scroll.clientWidth !== width) draw();
    width = scroll.clientWidth;
  }).observe(scroll);
  model.on(`change:${name}`, draw);
  draw();
}

function render({model, el}) {
  el.classList.add("ctlens-stage");
  const names = model.get("views");
  for (const name of names) addView(name, model, el);
  const near = new Set();  // the views on the screen or next to it; the kernel draws the others once they are near
  const watcher = new IntersectionObserver(seen => {
    for (const {target, isIntersecting} of seen) near[isIntersecting ? "add" : "delete"](target.dataset.view);
    model.set("visible", names.filter(name => near.has(name)));
    model.save_changes();
  }, {rootMargin: "100px 0px"});
  for (const section of el.children) watcher.observe(section);
}
