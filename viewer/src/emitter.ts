/** Who wants to know what. */
export class Emitter<Events> {
  private readonly listeners = new Map<keyof Events, ((value: never) => void)[]>();
  on<K extends keyof Events>(type: K, listener: (value: Events[K]) => void): void {
    this.listeners.set(type, [...(this.listeners.get(type) ?? []), listener as (value: never) => void]);
  }
  emit<K extends keyof Events>(type: K, value: Events[K]): void {
    for (const listener of this.listeners.get(type) ?? []) (listener as (value: Events[K]) => void)(value);
  }
}
