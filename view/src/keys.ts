// What keys mean.

/** Whether a key is for the page: without a modifier, and not typed into what has a use for it itself. */
export function meant(event: KeyboardEvent, users = "input, select, dialog"): boolean {
  return !event.ctrlKey && !event.metaKey && !event.altKey && !(event.target as HTMLElement).closest(users);
}

/** Steps to the right and upwards that an arrow key asks for, which then does nothing else; null for other keys. */
export function arrow(event: KeyboardEvent): [right: number, up: number] | null {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
  if (steps) event.preventDefault();
  return (steps as [number, number] | undefined) ?? null;
}
