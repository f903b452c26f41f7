/** What went wrong, as a line for the page: whatever was thrown. */
export const reasonOf = (why: unknown): string => (why instanceof Error ? why.message : String(why));
